"""Which engine a training samples from: the one place that asks whether vLLM samples, and where."""

from typing import TYPE_CHECKING, cast

from accelerate.utils import is_peft_model

from treepo_trl.treepo_config import TreePOConfig

from .policy.adapter_sync import check_adapter
from .policy.engine import PolicyEngine, TransformersPolicy, VLLMPolicy
from .policy.engine_check import check_dropout
from .policy.engine_options import check_engine_options
from .policy.starting_adapter import check_given_adapter
from .servers.policy import ServerPolicy


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel, PeftType
    from transformers import PreTrainedModel


def policy_engine_for(
    args: TreePOConfig, model: "str | PreTrainedModel | PeftModel", peft_config: "PeftConfig | None"
) -> PolicyEngine:
    """
    The engine for these arguments of a trainer, not yet connected.

    Raises:
        ValueError: for an adapter that the engine cannot serve or be compared with, for options that it does not
            take, and for settings of a LoRA engine's weights where there is no LoRA engine.
    """
    check_engine_options(args)
    engine: PolicyEngine = TransformersPolicy(args)
    adapter = peft_config
    if adapter is None and not isinstance(model, str) and is_peft_model(model):
        check_given_adapter(cast("PeftModel", model), args.beta)
        adapter = cast("PeftModel", model).active_peft_config
    if adapter is not None:
        _check_kind(adapter, args.use_vllm)
        check_dropout(args, adapter)
    if args.use_vllm:
        loads_adapter = adapter is not None and args.vllm_lora_sync == "adapter"
        if adapter is not None and loads_adapter:
            check_adapter(adapter)
        if args.vllm_mode == "server":
            return ServerPolicy(args, loads_adapter)
        if loads_adapter:
            return VLLMPolicy(args, loads_adapter)
        engine = VLLMPolicy(args, loads_adapter=False)
    for name in ("vllm_share_base_weights", "vllm_sleep_keeps_weights"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}=True`, but the policy has no adapter: vLLM gets all its weights at each step. Pass a "
                "`peft_config` (`--use_peft`), or unset it."
            )
    return engine


def _check_kind(adapter: "PeftConfig", use_vllm: bool) -> None:
    """
    Raise for a kind of adapter with which no engine samples from the policy.

    Virtual tokens stand in front of a row's padding, and positions count it. So the policy that is trained depends on
    the padding (by nats), and there is no policy without padding that a segment could be sampled from.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    if adapter.is_prompt_learning:
        raise ValueError(
            f"The adapter is {kind}, which puts virtual tokens before each row: what the policy computes then depends "
            "on the padding between them and the prompt, and trees are sampled without padding. Train LoRA or another "
            "adapter inside of the layers, or use `GRPOTrainer`."
        )
    if use_vllm and not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(cast("PeftType", adapter.peft_type)), "merge_adapter"):
        raise ValueError(
            f"The adapter is {kind}: vLLM serves LoRA adapters, and one that PEFT cannot merge into the base does not "
            "reach it otherwise. Leave `use_vllm` out, or change the adapter."
        )
