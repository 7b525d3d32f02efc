"""The policy on vLLM servers: it is sent there before a batch, and the main process samples for all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from trl.extras.profiling import profiling_context

from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult
from treepo_trl.policy.adapter_probe import PROBE_TOKENS, probe_adapter, probe_prompts
from treepo_trl.policy.engine import PolicyEngine, Sampled
from treepo_trl.policy.engine_check import EngineWatch, computing_dtype, dropout_of, logprob_difference
from treepo_trl.policy.shared_base import SHARDED
from treepo_trl.servers.connection import ServerConnection, ServerLostError
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl.host import Host
from treepo_trl.trl.seams import vllm_generation_class

from .generation import ServerGeneration, complete, gathered_rows
from .main_process import from_main_process
from .policy_servers import PolicyServers, bound_of_probe, check_policy


if TYPE_CHECKING:
    from peft import PeftModel

    from treepo_trl.servers.engine import VLLMServerEngine


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
        self._host, trainer = host, host.trainer
        self.samples_here = trainer.accelerator.is_main_process
        self._generation = cast(ServerGeneration, trainer.vllm_generation)
        self._generation.state = trainer.state
        self._generation.on_given = self._refer_to_policy
        self.engine = self._generation.engine = self._engine(trainer.eos_token_ids)
        policy, facts = trainer.accelerator.unwrap_model(host.model), self._generation.facts
        dtypes = computing_dtype(policy, host.accelerator), getattr(torch, facts.dtype)
        if self._generation.servers is not None:
            self._generation.servers.bound = bound_of_probe(*dtypes)
        self._watch = EngineWatch(
            self.args.engine_check,
            *dtypes,
            self.args.sampling_options(),
            lambda: dropout_of(policy),
        )

    def _engine(self, eos_token_ids: list[int]) -> SegmentEngine:
        from treepo_trl.servers.engine import VLLMServerEngine

        with_entropies, servers = self.args.branching_policy == "entropy", self._generation.servers
        if servers is None:
            return _NoEngine(with_entropies)
        engine = VLLMServerEngine(
            servers.servers,
            eos_token_ids,
            self.args.sampling_options(),
            self.args.generation_options(),
            with_entropies,
            model=servers.versions.model,
            timeout=self.args.vllm_server_timeout,
            on_connect=servers.admit,
            check_idle=servers.check_idle,
        )
        servers.on_lost = engine.lose
        return engine

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        trainer = self._host.trainer
        self._generation.state = trainer.state  # a training makes its own
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

    def _policy_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        model = self._host.wrapped_model
        return policy_logprobs(model, token_ids, self._host.accelerator.device)

    def _refer_to_policy(self) -> None:
        """If no server has taken the policy, those that come back are compared with its own numbers."""
        servers = self._generation.servers

        def wanted() -> list[int] | None:
            return servers.probe_ids() if servers is not None and servers.needs_reference else None

        probe = from_main_process(self._host.accelerator, wanted)
        if probe is not None:
            logprobs = self._policy_logprobs(probe)
            if servers is not None:
                servers.take_reference(logprobs)

    def _compare_policy(self) -> bool:
        """
        Raise if the servers compute another model than the policy: another base, or an old version.

        Returns:
            `bool`: whether there was something to compare.

        Raises:
            ValueError: whatever `engine_check` says, unless it is `"off"`.
        """
        servers, accelerator = self._generation.servers, self._host.accelerator
        probe = from_main_process(accelerator, lambda: cast(PolicyServers, servers).probe_ids())
        policy = self._policy_logprobs(probe)

        def check() -> bool:
            theirs = cast(PolicyServers, servers).reference
            if theirs is not None:
                difference = float((policy - theirs).abs().mean())
                is_quantized = self._generation.facts.quantization is not None
                check_policy(difference, cast(PolicyServers, servers).bound, is_quantized)
            return theirs is not None

        return from_main_process(accelerator, check)

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

    def _plain_engine(self) -> "VLLMServerEngine":
        """An engine that draws at temperature 1 from all tokens, over the servers that are there."""
        from treepo_trl.servers.engine import VLLMServerEngine

        servers, engine = cast(PolicyServers, self._generation.servers), cast(VLLMServerEngine, self.engine)

        def is_there(server: ServerConnection) -> bool:
            try:
                servers.check_idle(server)
                server.facts()
            except ServerLostError as error:
                engine.lose(server, error)
                return False
            return True

        while True:
            there = [server for server in engine.wait_for_servers() if is_there(server)]
            with suppress(ServerLostError):  # since then
                if there:
                    return VLLMServerEngine(
                        there,
                        [],
                        model=servers.versions.model,
                        timeout=self.args.vllm_server_timeout,
                        on_connect=servers.admit,
                        check_idle=servers.check_idle,
                    )

    def _plain_segments(self, rows: list[list[int]]) -> list[SegmentResult]:
        """Segments by an engine of its own: the trainer's draws as settings say."""
        engine = self._plain_engine()
        try:
            return complete(engine, rows, lambda _: PROBE_TOKENS)
        finally:
            engine.close()


def policy_logprobs(model: torch.nn.Module, token_ids: list[int], device: torch.device) -> torch.Tensor:
    """Log-probabilities of all tokens but the first by the policy without dropout. All processes call it together."""
    is_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([token_ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    finally:
        for module, mode in is_training:
            module.training = mode
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].double().cpu()
