"""
From the policy to the vLLM engine: the adapter alone for LoRA and QLoRA, TRL's push of all weights otherwise.

Stock TRL merges the adapter into the base model and pushes every weight before each generation. Merging into 4-bit
weights is lossy and in bfloat16 the merge and unmerge cycle drifts. Here the base model is never touched: the engine
is built with LoRA enabled on the same base, and the adapter's files travel through memory-backed storage.
"""

import os
import random
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object, is_peft_model
from transformers import set_seed
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration, empty_cache

from treepo_trl.treepo_config import BaseWeights

from .base_checkpoint import base_checkpoint, choose_base_weights, is_4bit
from .shared_base import different_weights, parked, share_weights


logger = get_logger(__name__)

_ADAPTER_NAME = "policy"
_ADAPTER_ID = 1
_KEEPS_WEIGHTS = "treepo_trl.policy.keep_weights_worker.KeepWeightsWorker"
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """
    Replace a name that TRL looks up in one of its modules or objects while one of its methods runs.

    Raises:
        AttributeError: if the owner does not have the name any more.
    """
    original, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:  # an object's class has it
            delattr(owner, name)


def check_adapter(peft_config: Any) -> None:
    """
    Raise unless vLLM can serve an adapter with this [`~peft.PeftConfig`].

    Raises:
        ValueError: naming the setting and what to do.
    """
    advice = "Change the adapter, or set `vllm_lora_sync='merge'`."
    if peft_config.peft_type != "LORA":
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(f"vLLM serves LoRA adapters, this one is {kind}. {advice}")
    for name, allowed in (("use_dora", (False, None)), ("bias", ("none",)), ("modules_to_save", (None, []))):
        value = getattr(peft_config, name)
        if value not in allowed:
            raise ValueError(f"vLLM serves no adapters with `{name}={value!r}`. {advice}")
    if getattr(peft_config, "lora_bias", False):
        raise ValueError(f"vLLM serves no adapters with `lora_bias=True`. {advice}")
    if peft_config.init_lora_weights not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"`init_lora_weights={peft_config.init_lora_weights!r}` changes the base weights, which the engine loads "
            f"unchanged. {advice}"
        )
    for name in ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices"):
        value = getattr(peft_config, name, None)
        if value:
            raise ValueError(f"vLLM serves no adapters with `{name}` ({value!r}). {advice}")


def engine_lora_rank(rank: int) -> int:
    """
    Smallest `max_lora_rank` of vLLM that holds an adapter of this rank.

    Raises:
        ValueError: if the rank is above vLLM's largest.
    """
    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    for allowed in ranks:
        if rank <= allowed:
            return allowed
    raise ValueError(f"vLLM serves adapters up to rank {ranks[-1]}, this one has {rank}. Lower `r`.")


class AdapterVLLMGeneration(VLLMGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] that gives the engine the adapter instead of merged weights.

    Only for `mode="colocate"` and a model with one LoRA adapter. The engine sleeps at level 1, since a LoRA engine's
    wrapped weights cannot be pushed again after level 2. `llm.lora_request` is what every request must carry to be
    answered by the policy; `generate` does so by itself.

    Args:
        base_weights (`str`):
            `vllm_base_weights` of [`TreePOConfig`].
        share_base_weights (`bool`):
            Let the policy compute with the engine's copy of the frozen base.
        sleep_keeps_weights (`bool`):
            Whether a sleeping engine frees its cache alone. Shared weights stay in any case.
    """

    model: Any
    llm: Any

    def __init__(
        self,
        *args: Any,
        base_weights: BaseWeights = "auto",
        share_base_weights: bool = False,
        sleep_keeps_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        self.base_weights: BaseWeights = base_weights
        self.share_base_weights = share_base_weights
        self.sleep_keeps_weights = sleep_keeps_weights or share_base_weights
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.share_base_weights:
            self._check_sharing()
        peft_config = self.model.peft_config[self.model.active_adapter]
        self._adapter_dir = _memory_backed_directory()
        weakref.finalize(self, shutil.rmtree, self._adapter_dir, ignore_errors=True)
        # The commit that the policy was loaded from; TRL gives the engine the name alone.
        revision = getattr(self.model.get_base_model().config, "_commit_hash", None)
        engine_options: dict[str, Any] = {
            "max_lora_rank": engine_lora_rank(peft_config.r),
            "revision": revision,
            "tokenizer_revision": revision,
            **self._worker_options(),
        }
        with ExitStack() as stack:
            if is_4bit(self.model):
                self.base_weights = choose_base_weights(
                    self.base_weights,
                    self.model,
                    self.accelerator.device,
                    self.gpu_memory_utilization,
                    self.tensor_parallel_size,
                    self.share_base_weights,
                )
                engine_options |= {
                    "model": stack.enter_context(self._shared_checkpoint(self.base_weights)),
                    "revision": None,
                    "tokenizer": self.model.name_or_path,
                    "quantization": "bitsandbytes" if self.base_weights == "quantized" else None,
                }
            stack.enter_context(replaced(vllm_generation, "LLM", _lora_llm_class(engine_options)))
            if self.share_base_weights:  # the card need not hold the base twice, not even while the engine is built
                stack.enter_context(parked(self.model.get_base_model()))
                empty_cache()
            super()._init_vllm()  # ends with all processes waiting for each other: the checkpoint is read
            if self.share_base_weights:
                self._report_sharing(*self._share_base_weights())
        self._try_adapter()

    def _check_sharing(self) -> None:
        sharding = self.accelerator.distributed_type
        if sharding in _SHARDED:
            raise ValueError(
                f"`vllm_share_base_weights=True`, but {sharding.value} splits the policy's weights over processes, "
                "and the engine holds whole ones. Unset it, or train without sharding."
            )
        places = set(getattr(self.model.get_base_model(), "hf_device_map", {}).values())
        if len(places) > 1:
            names = sorted(map(str, places))
            advice = "let the process see one GPU (`CUDA_VISIBLE_DEVICES=0`)"
            if {"cpu", "disk"} & set(names):
                advice = "load the policy in 4 bits (`load_in_4bit`): it does not fit the GPU"
            raise ValueError(
                f"`vllm_share_base_weights=True`, but the policy is spread over {', '.join(names)} and the engine is "
                f"on one device. Unset it, or {advice}."
            )

    def _worker_options(self) -> dict[str, str]:
        device = self.accelerator.device.type
        if not (self.enable_sleep_mode and self.sleep_keeps_weights) or device == "cpu":  # where vLLM never sleeps
            return {}
        if device != "cuda":
            raise ValueError(
                f"`vllm_sleep_keeps_weights` and `vllm_share_base_weights` with `vllm_enable_sleep_mode=True` are for "
                f"CUDA, this is {device!r}. Unset `vllm_enable_sleep_mode`."
            )
        return {"worker_cls": _KEEPS_WEIGHTS}

    @property
    def _engine_model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def _share_base_weights(self) -> tuple[int, dict[str, int]]:
        return share_weights(self.model.get_base_model(), self._engine_model, self.accelerator.device)

    def _report_sharing(self, shared: int, own: dict[str, int]) -> None:
        """
        Log how much of the base there is once; a warning if it is less than nine tenths.

        Raises:
            ValueError: if it is nothing.
        """
        policy, engine = (
            str(dtype).removeprefix("torch.")
            for dtype in (self.model.get_base_model().dtype, self.llm.llm_engine.model_config.dtype)
        )
        if not shared:
            raise ValueError(
                f"`vllm_share_base_weights=True`, but no weight of the engine ({engine}) was found equal to the "
                f"policy's ({policy}). Load the policy in the engine's precision "
                f'(`model_init_kwargs={{"dtype": "{engine}"}}`, `--dtype {engine}`). If it is, vLLM arranges this '
                "model's weights otherwise: unset it."
            )
        kept = sum(own.values())
        message = f"Policy and engine share {shared / 2**30:.2f} GiB of the base."
        if kept <= 0.1 * (shared + kept):
            logger.info(message)
            return
        largest = sorted(own, key=lambda name: -own[name])[:3]
        logger.warning(
            f"{message} {kept / 2**30:.2f} GiB are held twice, {', '.join(largest)} for example: their numbers or "
            f"their precision (policy {policy}, engine {engine}) differ, or vLLM arranges them otherwise."
        )

    def _compare_base_weights(self) -> None:
        """Warn of a base that was changed in memory: the engine, which must be awake, has loaded the checkpoint."""
        if self.tensor_parallel_size > 1 or self.accelerator.distributed_type in _SHARDED:
            return  # one of the two has no whole weights
        different = different_weights(self.model.get_base_model(), self._engine_model)
        if different:
            logger.warning(
                f"Weights of the policy's base ({len(different)}, {different[0]} for example) differ from those that "
                f"vLLM has loaded from {self.model.name_or_path!r}: it samples from another model. If the base "
                "was changed in memory (a merged adapter, resized embeddings), save it and load it from there, or set "
                "`vllm_lora_sync='merge'`."
            )

    @contextmanager
    def _shared_checkpoint(self, base_weights: Literal["quantized", "dequantized"]) -> Iterator[str]:
        """Folder with the policy's 4-bit base for the engine, written by one process of each machine."""
        accelerator = self.accelerator
        with ExitStack() as stack:
            folder = None
            if accelerator.is_local_main_process:
                folder = stack.enter_context(base_checkpoint(self.model, base_weights))
            folders = gather_object([folder])
            yield folders[accelerator.process_index - accelerator.local_process_index]

    def _try_adapter(self) -> None:
        """Load the untrained adapter: what vLLM cannot serve is an error now and not after the first step."""
        try:
            self.sync_weights()
        except ValueError as error:
            raise ValueError(
                f"vLLM cannot serve this adapter: {error} Change its `target_modules`, or set "
                "`vllm_lora_sync='merge'`."
            ) from error
        self._compare_base_weights()
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True

    def sync_weights(self) -> None:
        """Load the policy's adapter into the engine and forget what its predecessor computed."""
        from vllm.lora.request import LoRARequest

        if self.share_base_weights:
            self._share_base_weights()  # again: preparing the policy for training may have copied it
        adapter = self.model.active_adapter
        parameters = [p for name, p in self.model.named_parameters() if f".{adapter}." in name]
        with self._dist.gather_params(parameters):
            self.model.save_pretrained(self._adapter_dir, selected_adapters=[adapter], save_embedding_layers=False)
        directory = self._adapter_dir if adapter == "default" else os.path.join(self._adapter_dir, adapter)
        if self.enable_sleep_mode:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        # Without `load_inplace` the engine silently keeps the adapter that it has under this id.
        self.llm.llm_engine.add_lora(LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, directory, load_inplace=True))
        self.llm.lora_request = LoRARequest(_ADAPTER_NAME, _ADAPTER_ID, directory)
        # The prefix cache is keyed by the adapter's name: the old adapter's states would be reused.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache after an adapter was loaded: requests are running."
            )


def _lora_llm_class(engine_options: dict[str, Any]) -> type:
    """
    `vllm.LLM` with LoRA enabled and sleep that keeps the weights, to stand in where TRL builds its engine.

    `engine_options` go before what TRL passes.
    """
    from vllm import LLM

    class LoraLLM(LLM):
        lora_request: Any = None  # the policy's adapter, from the first sync on

        def __init__(self, **kwargs: Any) -> None:
            lora: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "enable_prefix_caching": True}
            super().__init__(**{**kwargs, **lora, **engine_options})

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault("lora_request", self.lora_request)
            return super().generate(*args, **kwargs)

        def sleep(self, level: int = 1, **kwargs: Any) -> None:
            super().sleep(level=min(level, 1), **kwargs)

    return LoraLLM


def _memory_backed_directory() -> str:
    shared_memory = Path("/dev/shm")
    parent = str(shared_memory) if shared_memory.is_dir() and os.access(shared_memory, os.W_OK) else None
    return tempfile.mkdtemp(prefix="treepo-adapter-", dir=parent)


@contextmanager
def same_draws(generation: VLLMGeneration, seed: str) -> Iterator[None]:
    """
    Give the ranks that share an engine by tensor parallelism the same random numbers for a block.

    Each of these ranks draws its tokens itself, from the process's generators; a reward function or dropout that drew
    on one rank alone would make their samples differ, and the engine's collective calls hang. Does nothing without
    tensor parallelism.
    """
    if generation.tensor_parallel_size == 1:
        yield
        return
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        set_seed(zlib.crc32(seed.encode()))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def gather_prompts(generation: VLLMGeneration, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
    """
    Prompts of all ranks that share an engine by tensor parallelism, in order of rank, and where this rank's own are.

    Every rank of the group must submit the same requests in the same order.
    """
    if generation.tensor_parallel_size == 1:
        return prompts, slice(0, len(prompts))
    group: Any = generation.tp_group
    gathered: list[Any] = [None] * generation.tensor_parallel_size
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
