"""
The engine that samples from the policy, and what must hold while it samples.

A [`PolicyEngine`] is made before TRL builds its part of the engine, and connected to the trainer afterwards.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase
from trl.extras.profiling import profiling_context
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import unwrap_model_for_generation

from treepo_trl.engines import SegmentEngine, SegmentResult
from treepo_trl.treepo_config import TreePOConfig
from treepo_trl.trl.generation import awake, gather_prompts, same_draws
from treepo_trl.trl.host import Host
from treepo_trl.trl.seams import engine_class, vllm_generation_class

from .adapter_probe import probe_adapter, probe_prompts, segments_of
from .adapter_sync import AdapterVLLMGeneration
from .engine_check import EngineWatch, computing_dtype, different_tokens, dropout_of, logprob_difference
from .engine_options import engine_options
from .gathered_adapter import check_own_forward
from .shared_base import SHARDED


if TYPE_CHECKING:
    from peft import PeftModel

    from treepo_trl.engines.own_model import OwnModelEngine
    from treepo_trl.engines.vllm import VLLMEngine


Sampled = TypeVar("Sampled")


class PolicyEngine:
    """
    The engine of a trainer.

    Attributes:
        engine ([`~treepo_trl.engines.SegmentEngine`]):
            What the sampler drives, inside of `ready`.
        processes_per_engine (`int`):
            Processes that sample together with one engine.
        samples_here (`bool`):
            Whether this process drives the engine, and not another one for it.
        gives_logprobs (`bool`):
            Whether the engine's log-probabilities are to be compared with the policy's. Where the policy itself has
            sampled, they are its own up to rounding, and `GRPOTrainer` has none either.
    """

    engine: SegmentEngine
    processes_per_engine = 1
    samples_here = True
    gives_logprobs = False

    def __init__(self, args: TreePOConfig) -> None:
        self.args = args

    def construction(self) -> AbstractContextManager[None]:
        """Context in which `GRPOTrainer.__init__` builds its part of the engine."""
        return nullcontext()

    def connect(self, host: Host) -> None:
        """Build the engine over what `GRPOTrainer.__init__` has made."""
        raise NotImplementedError

    def training_starts(self) -> None:
        """What was found out about the engine may be of another training."""

    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> AbstractContextManager[None]:
        """
        Context in which the engine samples from the current policy, after these prompts among others.

        Args:
            seed (`str`):
                Of the draws.
            prompts (`list[list[int]]`):
                Token ids of prompts that are to be continued.
            in_batch (`bool`, *optional*, defaults to `False`):
                Whether a batch of the training is sampled, which all processes do together. A user may sample on one.
        """
        raise NotImplementedError

    def evaluation(self) -> AbstractContextManager[None]:
        """Context in which `GRPOTrainer` samples by itself."""
        return nullcontext()

    def gather(self, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
        """Prompts of all processes that sample together, and where this process's own are among them."""
        return prompts, slice(0, len(prompts))

    def shared(self, sample: Callable[[], Sampled]) -> Sampled:
        """What a sampling of the gathered prompts gives, in all processes that sample together. Inside of `ready`."""
        return sample()

    def compare(self, output: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """
        Metrics of how far the engine was from the policy in a batch; none where the policy itself has sampled.

        Args:
            output (`Mapping[str, torch.Tensor]`):
                What `GRPOTrainer._generate_and_score_completions` returns.

        Raises:
            RuntimeError: if `engine_check` is `"error"` and the engine did not compute the policy.
        """
        return {}


class TransformersPolicy(PolicyEngine):
    """The policy's own forward samples."""

    engine: "OwnModelEngine"

    def connect(self, host: Host) -> None:
        from treepo_trl.engines.for_model import engine_for_model

        self._host = host
        check_own_forward(host.accelerator, self.args.ds3_gather_for_generation)
        self.engine = engine_for_model(
            host.policy,
            host.trainer.eos_token_ids,
            self.args.sampling_options(),
            with_entropies=self.args.branching_policy == "entropy",
        )

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        host = self._host
        with (
            profiling_context(host.trainer, "transformers.generate"),
            unwrap_model_for_generation(
                host.wrapped_model,
                host.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=host.trainer.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # pyright: ignore[reportArgumentType]
            ) as model,
            host.whole_parameters(),
        ):
            # `torch_compile` would compile anew for each number of rows and tokens.
            self.engine.model = host.accelerator.unwrap_model(model, keep_torch_compile=False)
            model.eval()  # dropout off, as in vLLM
            try:
                yield
            finally:
                self.engine.reset_prefix_cache()
                model.train()


class VLLMPolicy(PolicyEngine):
    """
    A vLLM engine in this process samples.

    Args:
        args ([`TreePOConfig`]):
            Settings of the training.
        loads_adapter (`bool`):
            Whether the policy's adapter alone travels to the engine.
    """

    engine: "VLLMEngine"
    gives_logprobs = True

    def __init__(self, args: TreePOConfig, loads_adapter: bool) -> None:
        super().__init__(args)
        self.processes_per_engine = args.vllm_tensor_parallel_size
        self._loads_adapter = loads_adapter
        self._is_probed = False  # in this training
        self._num_evaluated = 0  # batches of completions that were sampled in evaluation

    def construction(self) -> AbstractContextManager[None]:
        options = engine_options(self.args)
        if not self._loads_adapter:
            from .vllm_classes import PolicyLLM, with_options

            return engine_class(with_options(PolicyLLM, options)) if options else nullcontext()
        return vllm_generation_class(
            partial(
                AdapterVLLMGeneration,
                base_weights=self.args.vllm_base_weights,
                share_base_weights=self.args.vllm_share_base_weights,
                sleep_keeps_weights=self.args.vllm_sleep_keeps_weights,
                engine_options=options,
            )
        )

    def connect(self, host: Host) -> None:
        from treepo_trl.engines.vllm import VLLMEngine

        from .vllm_classes import give_classes_back

        self._host = host
        self._generation: VLLMGeneration = host.trainer.vllm_generation
        give_classes_back(host.model)
        self.engine = VLLMEngine(
            self._generation.llm,
            host.trainer.eos_token_ids,
            self.args.sampling_options(),
            self.args.generation_options(),
            with_entropies=self.args.branching_policy == "entropy",
        )
        self._watch = self._engine_watch(host)

    def _engine_watch(self, host: Host) -> EngineWatch:
        llm = self._generation.llm
        policy = host.policy

        def facts() -> list[str]:
            theirs = cast(PreTrainedTokenizerBase, llm.get_tokenizer())
            return different_tokens(host.tokenizer, theirs) + dropout_of(policy)

        return EngineWatch(
            self.args.engine_check,
            computing_dtype(policy, host.accelerator),
            cast(torch.dtype, llm.llm_engine.model_config.dtype),
            self.args.sampling_options(),
            facts,
        )

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        host, trainer, generation = self._host, self._host.trainer, self._generation
        if in_batch and not self._is_probed and self._can_probe():
            with profiling_context(trainer, "probe_adapter"):
                self._probe(prompts)
            self._is_probed = True
            host.is_loaded = True  # the probe has loaded the adapter again
        if not host.is_loaded:
            with profiling_context(trainer, "sync_weights"):
                generation.sync_weights()
            host.is_loaded = True
        with awake(generation), same_draws(generation, seed), profiling_context(trainer, "vLLM.generate"):
            if isinstance(generation, AdapterVLLMGeneration):
                self.engine.lora_request = generation.llm.lora_request
            yield

    def training_starts(self) -> None:
        self._is_probed = False

    def evaluation(self) -> AbstractContextManager[None]:
        self._num_evaluated += 1
        return same_draws(self._generation, f"{self.args.seed}/evaluation/{self._num_evaluated}")

    def gather(self, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
        return gather_prompts(self._generation, prompts)

    def compare(self, output: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return self._watch.batch(logprob_difference(output, self._host.accelerator))

    def _can_probe(self) -> bool:
        """Whether an adapter travels to the engine, and each process holds all of it."""
        return self._loads_adapter and self._watch.is_on and self._host.accelerator.distributed_type not in SHARDED

    def _probe(self, prompts: list[list[int]]) -> None:
        generation = cast(AdapterVLLMGeneration, self._generation)

        def sample(prompts: list[list[int]]) -> list[SegmentResult]:
            from treepo_trl.engines.vllm import VLLMEngine

            with awake(generation):
                # An engine of its own: the trainer's draws as the settings say, and counts tokens.
                return segments_of(VLLMEngine(generation.llm, [], lora_request=generation.llm.lora_request), prompts)

        policy = cast("PeftModel", self._host.policy)
        wanted = probe_prompts(prompts, self.engine.context_length, self.engine.block_size)
        found = probe_adapter(policy, generation.sync_weights, sample, wanted, bound=self._watch.bound)
        self._watch.probed(found)
