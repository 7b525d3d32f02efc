"""vLLM's engine and worker as a policy needs them. Imported when an engine is built: vLLM is optional."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm import LLM, RequestOutput  # noqa: TID253 - nothing imports this module before an engine is built
from vllm.v1.worker.gpu_worker import Worker  # noqa: TID253


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class PolicyLLM(LLM):
    """[`~vllm.LLM`] with options that TRL does not pass on."""

    engine_options: ClassVar[dict[str, object]] = {}
    """Options of `vllm.LLM` that go before what TRL passes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, **self.engine_options})


def with_options(llm: type[PolicyLLM], options: dict[str, object]) -> type[PolicyLLM]:
    """The same class with these options, to stand in where TRL builds its engine."""
    return type(llm.__name__, (llm,), {"engine_options": options})


class LoraLLM(PolicyLLM):
    """
    [`~vllm.LLM`] whose requests carry the policy's adapter and whose sleep keeps the weights.

    TRL puts its engine to sleep at level 2, which drops the weights, and pushes them again. The wrapped weights of a
    LoRA engine cannot be pushed, so this one sleeps at level 1.
    """

    lora_request: "LoRARequest | None" = None
    """The policy's adapter, from the first synchronization on."""

    def generate(self, *args: Any, **kwargs: Any) -> list[RequestOutput]:
        kwargs.setdefault("lora_request", self.lora_request)
        return super().generate(*args, **kwargs)

    def sleep(self, level: int = 1, **kwargs: Any) -> None:
        super().sleep(level=min(level, 1), **kwargs)


class KeepWeightsWorker(Worker):
    """
    [`~vllm.v1.worker.gpu_worker.Worker`] with its weights in ordinary memory of the card; vLLM imports it by name.

    Sleep mode frees what lies in a memory pool of its own: the weights, which vLLM moves to the processor's memory or
    drops, and the cache. With the weights outside, sleeping frees the cache, and waking up copies nothing.
    """

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext() if tag == "weights" else super()._maybe_get_memory_pool_context(tag)


def give_classes_back(policy: torch.nn.Module) -> None:
    """
    Let a policy run, and models of its classes be built, beside a vLLM engine in the same process.

    Families that vLLM has no code of its own for (SmolLM3, OLMo 3) are served by transformers' class, which vLLM
    changes for everybody. Each instance must then be built in vLLM's context and say whether it is compiled. The
    engine's instance is built already and says so by itself.

    Args:
        policy (`torch.nn.Module`):
            The policy, wrapped or not.
    """
    for changed in {type(module) for module in policy.modules()}:
        is_changed = any(base.__module__ == "vllm.compilation.wrapper" for base in changed.__bases__)
        if is_changed and "do_not_compile" not in vars(changed):
            changed.do_not_compile = True  # pyright: ignore[reportAttributeAccessIssue] - of instances that do not say
            changed.__init__ = inspect.getclosurevars(changed.__init__).nonlocals["old_init"]
