"""
What TRL keeps between a trainer and vLLM (`VLLMGeneration`, 1.16): its private names, and an engine driven without it.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from accelerate.utils import is_peft_model, set_seed
from trl.generation.vllm_generation import VLLMGeneration


class OwnGeneration(VLLMGeneration):
    """[`~trl.generation.vllm_generation.VLLMGeneration`] with public names for what subclasses change and read."""

    def _init_vllm(self) -> None:
        self.start()

    def start(self) -> None:
        """Build the engine, or connect to it."""
        super()._init_vllm()

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has given its weights back."""
        return self._llm_weights_sleeping

    @is_asleep.setter
    def is_asleep(self, value: bool) -> None:
        self._llm_weights_sleeping = value

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as in the checkpoint and whole tensors; all processes go through it together, to its end."""
        return cast("Iterator[tuple[str, torch.Tensor]]", self._iter_named_params())


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Draw from generators with this seed for a block. Afterwards all go on as if nothing had been drawn."""
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def same_draws(generation: VLLMGeneration, seed: str) -> Iterator[None]:
    """
    Give the ranks that share an engine by tensor parallelism the same random numbers for a block.

    Each of these ranks draws its tokens itself, from the process's generators. A reward function or dropout that drew
    on one rank alone would make their samples differ, and the engine's collective calls hang. Does nothing without
    tensor parallelism.
    """
    if generation.tensor_parallel_size == 1:
        yield
        return
    with own_draws(zlib.crc32(seed.encode())):
        yield


def gather_prompts(generation: VLLMGeneration, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
    """
    Prompts of all ranks that share an engine by tensor parallelism, in order of rank, and where this rank's own are.

    Every rank of the group must submit the same requests in the same order.
    """
    if generation.tensor_parallel_size == 1:
        return prompts, slice(0, len(prompts))
    gathered: list[list[list[int]]] = [[]] * generation.tensor_parallel_size
    group = cast("torch.distributed.ProcessGroup", generation.tp_group)
    torch.distributed.all_gather_object(gathered, prompts, group=group)
    rank = torch.distributed.get_rank(group=group)
    start = sum(len(part) for part in gathered[:rank])
    return [prompt for part in gathered for prompt in part], slice(start, start + len(prompts))


@contextmanager
def awake(generation: VLLMGeneration) -> Iterator[None]:
    """Wake a sleeping engine for a block that drives it without `generate`, as `generate` itself does."""
    if generation.enable_sleep_mode:
        if generation._llm_weights_sleeping:
            generation.sync_weights()
        generation.llm.wake_up(tags=["kv_cache"])
    if generation.tensor_parallel_size > 1 and is_peft_model(generation.model):
        # As in TRL's `generate`: vLLM's collective calls must not overlap those of the synchronization.
        accelerator = generation.accelerator
        on_cuda = accelerator.device.type == "cuda"
        torch.distributed.barrier(device_ids=[accelerator.local_process_index] if on_cuda else None)
    try:
        yield
    finally:
        if generation.enable_sleep_mode:
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True
