"""The policy on vLLM servers: it is sent there before a batch, and the main process samples for all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from trl.extras.profiling import profiling_context

from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult
from treepo_trl.policy.adapter_probe import PROBE_TOKENS, probe_adapter, probe_prompts
from treepo_trl.policy.engine import PolicyEngine, Sampled
from treepo_trl.policy.engine_check import EngineWatch, computing_dtype, dropout_of, logprob_difference
from treepo_trl.policy.shared_base import SHARDED
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl.host import Host
from treepo_trl.trl.seams import vllm_generation_class

from .engine import VLLMServerEngine
from .fleet import Fleet
from .generation import ServerGeneration, complete, gathered_rows
from .main_process import from_main_process
from .reference import Reference, bound_of_probe


if TYPE_CHECKING:
    from peft import PeftModel


class _NoEngine(SegmentEngine):
    """In processes that do not sample: the main process does."""

    def __init__(self, with_entropies: bool) -> None:
        self.reports_entropies = with_entropies

    def submit(self, requests: list[SegmentRequest]) -> None:
        raise RuntimeError("The main process samples for all.")

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        raise RuntimeError("The main process samples for all.")

    def abort(self) -> None:
        return


class ServerPolicy(PolicyEngine):
    """
    vLLM servers sample. The main process asks them for all processes.

    Args:
        args ([`TreePOConfig`]):
            Settings of the training.
        loads_adapter (`bool`):
            Whether the policy's adapter alone travels to the servers.
    """

    gives_logprobs = True

    def __init__(self, args: TreePOConfig, loads_adapter: bool) -> None:
        super().__init__(args)
        self.processes_per_engine = args.world_size
        self._loads_adapter = loads_adapter
        self._is_probed = False  # in this training

    def construction(self) -> AbstractContextManager[None]:
        return vllm_generation_class(partial(ServerGeneration, settings=self.args, loads_adapter=self._loads_adapter))

    def connect(self, host: Host) -> None:
        self._host = host
        self.samples_here = host.accelerator.is_main_process
        self._generation = cast(ServerGeneration, host.trainer.vllm_generation)
        self._generation.host = host
        self.engine = self._generation.engine = self._engine(host.trainer.eos_token_ids)
        policy, facts = host.accelerator.unwrap_model(host.model), self._generation.facts
        dtypes = computing_dtype(policy, host.accelerator), getattr(torch, facts.dtype)
        if self._generation.fleet is not None and self._generation.fleet.reference is not None:
            self._generation.fleet.reference.bound = bound_of_probe(*dtypes)
        self._watch = EngineWatch(
            self.args.engine_check,
            *dtypes,
            self.args.sampling_options(),
            lambda: dropout_of(policy),
        )

    def _engine(self, eos_token_ids: list[int]) -> SegmentEngine:
        with_entropies, fleet = self.args.branching_policy == "entropy", self._generation.fleet
        if fleet is None:
            return _NoEngine(with_entropies)
        return VLLMServerEngine(
            fleet, eos_token_ids, self.args.sampling_options(), self.args.generation_options(), with_entropies
        )

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        trainer = self._host.trainer
        if not self._host.is_loaded:
            with profiling_context(trainer, "sync_weights"):
                self._generation.sync_weights()
            self._host.is_loaded = True
        if in_batch and not self._is_probed and self._watch.is_on:
            with profiling_context(trainer, "probe_servers"):
                self._is_probed = self._compare_policy()
                self._probe(prompts)
        with profiling_context(trainer, "vLLM.generate"):
            yield

    def training_starts(self) -> None:
        self._is_probed = False

    def gather(self, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
        return gathered_rows(prompts)[self._host.accelerator.process_index]

    def shared(self, sample: Callable[[], Sampled]) -> Sampled:
        return from_main_process(self._host.accelerator, sample)

    def compare(self, output: Mapping[str, torch.Tensor]) -> dict[str, float]:
        difference = logprob_difference(output, self._host.accelerator)
        return self._watch.batch(difference, is_older=self.args.rollout_ahead > 0)

    def _compare_policy(self) -> bool:
        """
        Raise if the servers compute another model than the policy: another base, or an old version.

        Returns:
            `bool`: whether there was something to compare.

        Raises:
            ValueError: whatever `engine_check` says, unless it is `"off"`.
        """
        accelerator = self._host.accelerator
        probe = from_main_process(accelerator, lambda: self._reference().token_ids)
        logprobs = self._generation.policy_logprobs(probe)
        return from_main_process(accelerator, lambda: self._reference().check_policy(logprobs))

    def _reference(self) -> Reference:
        """What the servers compute, in the main process."""
        return cast(Reference, cast(Fleet, self._generation.fleet).reference)

    def _probe(self, prompts: list[list[int]]) -> None:
        """Compare policy and servers with an adapter that is not zero, where each process holds all of it."""
        if not self._loads_adapter or self._host.accelerator.distributed_type in SHARDED:
            return
        generation, accelerator = self._generation, self._host.accelerator

        def sample(rows: list[list[int]]) -> list[SegmentResult]:
            return from_main_process(accelerator, lambda: self._plain_segments(rows))

        found = probe_adapter(
            cast("PeftModel", accelerator.unwrap_model(self._host.model)),
            generation.sync_weights,
            sample,
            probe_prompts(prompts, generation.facts.context_length, generation.facts.block_size),
            bound=self._watch.bound,
        )
        self._watch.probed(found)

    def _plain_segments(self, rows: list[list[int]]) -> list[SegmentResult]:
        """Segments at temperature 1 from all tokens: the trainer's engine draws as settings say."""
        return complete(VLLMServerEngine(cast(Fleet, self._generation.fleet), []), rows, lambda _: PROBE_TOKENS)
