"""What the vLLM engine is built with beside TRL's arguments, and what of it is not the user's."""

from dataclasses import fields
from typing import cast

from treepo_trl.engines.vllm import cache_options
from treepo_trl.treepo_config import TreePOConfig


OWNED = {
    "model": "use the trainer's `model` (`--model_name_or_path`)",
    "revision": "it takes the policy's commit; use `--model_revision`",
    "tokenizer": "it takes that of the model",
    "tokenizer_revision": "it takes that of the model; use `--model_revision`",
    "trust_remote_code": "use `trust_remote_code`",
    "model_impl": "use `vllm_model_impl`",
    "quantization": "use `load_in_4bit` and `vllm_base_weights`",
    "load_format": "use `load_in_4bit` and `vllm_base_weights`",
    "gpu_memory_utilization": "use `vllm_gpu_memory_utilization`",
    "max_model_len": "use `vllm_max_model_length`",
    "max_num_seqs": "it follows from `per_device_train_batch_size`, `steps_per_generation` and processes",
    "tensor_parallel_size": "use `vllm_tensor_parallel_size`",
    "pipeline_parallel_size": "a process has an engine of its own; use `vllm_tensor_parallel_size`",
    "data_parallel_size": "a process has an engine of its own; start more processes",
    "distributed_executor_backend": "the engine runs in the trainer's process; leave it out",
    "enable_sleep_mode": "use `vllm_enable_sleep_mode`",
    "worker_cls": "use `vllm_sleep_keeps_weights`",
    "enable_lora": "it follows from the adapter; use `vllm_lora_sync`",
    "max_loras": "there is one adapter; leave it out",
    "max_lora_rank": "it follows from the adapter; use `--lora_r`",
    "enable_prefix_caching": "trees live on it; leave it out",
    "logprobs_mode": "the update needs those of the sampling distribution; leave it out",
    "seed": "use `seed`",
}
"""Arguments of `vllm.LLM` that are not the user's, and what is to be set instead."""


def engine_options(args: TreePOConfig) -> dict[str, object]:
    """
    `vllm_engine_kwargs`, and before them what trees need.

    Also the number type of mixed precision: the engine computes in what the policy does.
    """
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    own = cache_options() | ({"dtype": mixed} if mixed else {})
    return own | cast("dict[str, object]", args.vllm_engine_kwargs or {})


def check_engine_options(args: TreePOConfig) -> None:
    """
    Raise for settings of the engine that cannot be served, before a model is loaded.

    Raises:
        ValueError: naming the setting to use instead.
    """
    given = cast("dict[str, object]", args.vllm_engine_kwargs or {})
    if args.vllm_gpu_memory_utilization == "auto":
        raise ValueError(
            "`vllm_gpu_memory_utilization` is 'auto', which `treepo-trl train` plans on one GPU. Elsewhere give a "
            "number above 0 and up to 1. `treepo-trl plan` says what fits."
        )
    if not given:
        return
    if not args.use_vllm:
        raise ValueError("`vllm_engine_kwargs` is for vLLM, but `use_vllm` is false. Set it, or leave them out.")
    for name in given:
        if name in OWNED:
            raise ValueError(f"`vllm_engine_kwargs` has {name}, which is not free: {OWNED[name]}.")
    if given.get("speculative_config") and args.device.type == "cpu":
        raise ValueError(
            "`vllm_engine_kwargs` has speculative_config, and this training runs on a processor. There vLLM (0.31 and "
            "0.32) never writes the temperatures of guessed tokens, and so samples something else than the policy. "
            "Leave it out."
        )
    from vllm import EngineArgs

    unknown = sorted(set(given) - {each.name for each in fields(EngineArgs)})
    if unknown:
        raise ValueError(
            f"`vllm_engine_kwargs` has {', '.join(unknown)}, which this vLLM does not know. Remove them, or look for "
            "their names in its `EngineArgs`."
        )
