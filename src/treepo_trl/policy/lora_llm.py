"""vLLM's engine with the policy's adapter. Imported when an engine is built: vLLM is optional."""

from typing import TYPE_CHECKING, Any, ClassVar

from vllm import LLM, RequestOutput  # noqa: TID253 - nothing imports this module before an engine is built


if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class PolicyLLM(LLM):
    """[`~vllm.LLM`] with options that TRL does not pass on."""

    engine_options: ClassVar[dict[str, object]] = {}
    """Options of `vllm.LLM` that go before what TRL passes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, **self.engine_options})


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
