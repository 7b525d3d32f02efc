"""
What stands in the place of TRL's `VLLMGeneration` where vLLM servers sample.

TRL's has a client, which asks one server for texts. `GRPOTrainer` finds the same names here: it sends the policy
(`sync_weights`) and samples by itself in evaluation (`generate`).
"""

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import PreTrainedTokenizerBase

from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult
from treepo_trl.policy.four_bit_base import is_4bit
from treepo_trl.policy.gathered_adapter import (
    bytes_of,
    check_whole_adapter,
    gathered_adapter,
    num_bytes,
    write_adapter,
)
from treepo_trl.policy.temporary_folder import shared_folder
from treepo_trl.settings import server_urls
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl.generation import OwnGeneration
from treepo_trl.trl.host import Host

from .checks import ServerNeeds
from .facts import ServerFacts
from .fleet import Fleet
from .main_process import from_main_process
from .reference import Reference, policy_logprobs
from .versions import AdapterVersions, WeightVersions, write_weights


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from trl.extras.profiling import ProfilingContext


class _CheckedServers:
    """What `GRPOTrainer` asks of its client: whether the log-probabilities are those of the sampling distribution."""

    def get_server_info(self) -> dict[str, dict[str, str]]:
        """Servers that give others are refused."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


class ServerGeneration(OwnGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] over servers that are given the policy.

    Args:
        settings ([`TreePOConfig`]):
            Of the training.
        loads_adapter (`bool`):
            Whether the policy's adapter alone travels.

    Attributes:
        facts ([`ServerFacts`]):
            Of the first server.
        fleet ([`Fleet`], *optional*):
            The servers, in the main process.
        host ([`Host`], *optional*):
            The trainer, once it is there.
        engine ([`~treepo_trl.engines.SegmentEngine`]):
            Over the servers, once it is there.
    """

    engine: SegmentEngine

    def __init__(self, *args: Any, settings: TreePOConfig, loads_adapter: bool, **kwargs: Any) -> None:
        self._settings, self._loads_adapter = settings, loads_adapter
        self.fleet: Fleet | None = None
        self.host: Host | None = None
        super().__init__(*args, **kwargs)

    def start(self) -> None:
        if is_peft_model(self.model) and is_4bit(cast("PeftModel", self.model)):
            raise ValueError(
                "The policy's base is in 4 bits, and `vllm_mode` is 'server': a server loads it in 16 bits, which is "
                "another model. Load the policy in 16 bits, or set `vllm_mode='colocate'`."
            )
        if self._loads_adapter:
            check_whole_adapter(self.accelerator)
        self.vllm_client = _CheckedServers()
        self.facts = from_main_process(self.accelerator, self._open)
        if self._loads_adapter:  # what the servers cannot load is an error now, not in the first batch
            self.sync_weights()

    def _open(self) -> ServerFacts:
        settings, adapter = self._settings, cast("PeftModel", self.model) if self._loads_adapter else None
        needs = ServerNeeds(
            cast(str, self.model.name_or_path),
            cast(PreTrainedTokenizerBase, getattr(self.processing_class, "tokenizer", self.processing_class)),
            settings.vllm_max_model_length or settings.max_completion_length + 1,
            settings.branching_policy == "entropy",
            0 if adapter is None else AdapterVersions.kept,
            0 if adapter is None else cast("LoraConfig", adapter.active_peft_config).r,
            all_weights=adapter is None,
        )
        size = bytes_of(self.model.parameters()) if adapter is None else num_bytes(adapter)
        self._folder = shared_folder("policy", settings.vllm_server_adapter_dir, size)
        kind = WeightVersions if adapter is None else AdapterVersions
        self._versions = kind(self._folder.path, uuid.uuid4().hex[:8])
        self.fleet = Fleet(
            server_urls(settings.vllm_server_base_url, settings.vllm_server_host, settings.vllm_server_port),
            needs,
            self._versions,
            settings.vllm_server_timeout,
            reference=Reference(needs, is_compared=settings.engine_check != "off"),
        )
        return self.fleet.servers[0].facts

    def sync_weights(self) -> None:
        """Give the servers the policy as it is. All processes call it together."""
        failed: Exception | None = None
        try:
            self._write(0 if self.host is None else self.host.state.global_step)
        except Exception as error:  # told to all processes below, which wait there
            failed = error

        def distribute() -> list[int] | None:
            if failed is not None:
                raise failed
            assert self.fleet is not None, "of the main process"
            return self.fleet.distribute()

        probe = from_main_process(self.accelerator, distribute)
        if failed is not None:  # in this process alone
            raise failed
        if probe is not None and self.host is not None:
            logprobs = self.policy_logprobs(probe)
            if self.fleet is not None:
                self.fleet.take_reference(logprobs)

    def policy_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """What the policy computes for the tokens of a probe. All processes call it together."""
        assert self.host is not None
        return policy_logprobs(self.host.wrapped_model, token_ids, self.accelerator.device)

    def _write(self, step: int) -> None:
        """Write the policy in the main process. What processes share is gathered by all of them."""
        if self._loads_adapter:
            model = cast("PeftModel", self.model)
            weights = gathered_adapter(model, self.accelerator)
            if self.fleet is not None:
                self._versions.write(step, partial(write_adapter, model, weights))
            return
        weights = self.weights()
        try:
            if self.fleet is not None:
                self._versions.write(step, partial(write_weights, weights))
        finally:
            for _ in weights:  # the others, and an error here, must not leave a gathering half done
                pass

    def generate(
        self,
        prompts: list[list[int]],
        images: list[object] | None,
        num_generations: int,
        profiler: "ProfilingContext | None" = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Independent completions, one for each of these rows, as `VLLMGeneration.generate` gives them."""
        if images is not None:
            raise ValueError("Image prompts are not supported on servers. Use text prompts.")
        rows, own = gathered_rows(prompts)[self.accelerator.process_index]
        with profiler or nullcontext():
            results = from_main_process(self.accelerator, lambda: self._complete(rows, num_generations))[own]
        tokens = [result.token_ids for result in results]
        logprobs = [[[value] for value in result.logprobs] for result in results]
        return prompts, tokens, logprobs, [[[token] for token in ids] for ids in tokens]

    def _complete(self, rows: list[list[int]], num_generations: int) -> list[SegmentResult]:
        room = self.engine.context_length or self.facts.context_length
        for ids in rows:
            if len(ids) >= room:
                raise ValueError(
                    f"A prompt has {len(ids)} tokens and leaves no room for a completion in the {room} tokens of the "
                    "servers. Drop or shorten such prompts, or start the servers with a larger `--max-model-len`."
                )
        longest = self.max_completion_length
        return complete(self.engine, rows, lambda ids: min(longest, room - len(ids)), num_generations)


def gathered_rows(rows: list[list[int]]) -> list[tuple[list[list[int]], slice]]:
    """Rows of all processes in order of rank, and where those of each process are among them."""
    parts = cast("list[list[list[int]]]", gather_object([rows]))
    everything = [row for part in parts for row in part]
    starts = [sum(map(len, parts[:rank])) for rank in range(len(parts))]
    return [(everything, slice(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]


def complete(
    engine: SegmentEngine, rows: list[list[int]], max_tokens: Callable[[list[int]], int], rows_per_prompt: int = 1
) -> list[SegmentResult]:
    """A segment after each row, in their order; rows of one prompt, which follow each other, go to one server."""
    requests = [SegmentRequest(i, ids, max_tokens(ids), tree=i // rows_per_prompt) for i, ids in enumerate(rows)]
    # A request that only waits in a server's queue would use up its deadline there.
    at_once = engine.num_slots(max(map(len, rows), default=1)) or max(len(requests), 1)
    try:
        results = [
            result
            for start in range(0, len(requests), at_once)
            for result in engine.complete(requests[start : start + at_once])
        ]
        return sorted(results, key=lambda result: result.request_id)
    finally:
        for tree in {request.tree for request in requests}:
            engine.end_tree(tree)
