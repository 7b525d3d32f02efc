"""What the vLLM engine is built with beside TRL's arguments, and what of it is not the user's."""

from dataclasses import fields
from typing import cast

from treepo_trl.engines.vllm import cache_options
from treepo_trl.treepo_config import TreePOConfig


GUESSES = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""Arguments of `vllm.LLM` of which each lets it guess tokens."""

_DATA_PARALLEL = (
    *("data_parallel_size", "enable_elastic_ep", "elastic_ep_max_dp_size"),
    *("data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_address"),
    *("data_parallel_rpc_port", "data_parallel_backend", "data_parallel_hybrid_lb", "data_parallel_external_lb"),
    "data_parallel_multi_port_external_lb",
)
_CONFIG = "policy and engine read one configuration; change `config.json` of the model"
_WEIGHTS = "use `load_in_4bit` and `vllm_base_weights`"
_MEMORY = "use `vllm_gpu_memory_utilization`"
_TOKENIZER = "tokens are compared with those of the engine's tokenizer; leave it out"
_GENERATES = "the engine continues text; leave it out"
_SPLIT = "a process has an engine of its own; use `vllm_tensor_parallel_size`"
_OWN_ENGINE = "a process has an engine of its own; start more processes"
_LAUNCHED = "the engine runs in the trainer's process, on its card; leave it out"
_OUTSIDE = "keys and values outside the engine outlive a change of the weights; leave it out"
_OTHER_DISTRIBUTION = "the update knows no other distribution than that of the sampling settings; leave it out"

OWNED = {
    "model": "use the trainer's `model` (`--model_name_or_path`)",
    "model_weights": "use the trainer's `model` (`--model_name_or_path`)",
    **dict.fromkeys(("hf_config_path", "hf_overrides"), _CONFIG),
    "model_class_overrides": "use `vllm_model_impl`",
    **dict.fromkeys(("runner", "convert"), _GENERATES),
    "revision": "it takes the policy's commit; use `--model_revision`",
    "tokenizer": "it takes that of the model",
    "tokenizer_revision": "it takes that of the model; use `--model_revision`",
    **dict.fromkeys(("skip_tokenizer_init", "tokens_only"), _TOKENIZER),
    "trust_remote_code": "use `trust_remote_code`",
    "model_impl": "use `vllm_model_impl`",
    **dict.fromkeys(("quantization", "quantization_config", "load_format"), _WEIGHTS),
    **dict.fromkeys(("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"), _MEMORY),
    "enable_extensible_kv_cache": _MEMORY,
    **dict.fromkeys(("kv_transfer_config", "kv_offloading_size", "kv_offloading_backend"), _OUTSIDE),
    "max_model_len": "use `vllm_max_model_length`",
    "max_num_seqs": "it follows from `per_device_train_batch_size`, `steps_per_generation` and processes",
    "tensor_parallel_size": "use `vllm_tensor_parallel_size`",
    **dict.fromkeys(("pipeline_parallel_size", "prefill_context_parallel_size"), _SPLIT),
    **dict.fromkeys(_DATA_PARALLEL, _OWN_ENGINE),
    **dict.fromkeys(("distributed_executor_backend", "device_ids"), _LAUNCHED),
    **dict.fromkeys(("master_addr", "master_port", "nnodes", "node_rank"), _LAUNCHED),
    **dict.fromkeys(("_api_process_count", "_api_process_rank"), _LAUNCHED),
    **dict.fromkeys(("enable_sleep_mode", "sleep_mode_backend"), "use `vllm_enable_sleep_mode`"),
    "checkpoint_prepare_on_startup": "the engine would wait for a server's request; leave it out",
    "sleep_preserve_parameter_names": "use `vllm_sleep_keeps_weights`",
    "worker_cls": "use `vllm_sleep_keeps_weights`",
    "weight_transfer_config": "the trainer gives an engine in its process the weights; leave it out",
    "enable_lora": "it follows from the adapter; use `vllm_lora_sync`",
    **dict.fromkeys(("max_loras", "default_mm_loras"), "there is one adapter; leave it out"),
    "max_lora_rank": "it follows from the adapter; use `--lora_r`",
    "lora_target_modules": "it follows from the adapter; use `--lora_target_modules`",
    "enable_prefix_caching": "trees live on it; leave it out",
    "logprobs_mode": "the update needs those of the sampling distribution; leave it out",
    **dict.fromkeys(("logits_processors", "watermark_config", "diffusion_config"), _OTHER_DISTRIBUTION),
    "seed": "use `seed`",
}
"""Arguments of `vllm.LLM` that are not the user's, and what is to be set instead."""


def engine_options(args: TreePOConfig) -> dict[str, object]:
    """
    `vllm_engine_kwargs`, and before them what trees need.

    Also the number type of mixed precision: the engine computes in what the policy does.
    """
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    own = cache_options(on_processor=args.device.type == "cpu") | ({"dtype": mixed} if mixed else {})
    return own | cast("dict[str, object]", args.vllm_engine_kwargs or {})


def check_engine_options(args: TreePOConfig) -> None:
    """
    Raise for settings of the engine that cannot be served, before a model is loaded.

    Raises:
        ValueError: naming the setting to use instead.
    """
    given = cast("dict[str, object]", args.vllm_engine_kwargs or {})
    if not given:
        return
    for name in given:
        if name in OWNED:
            raise ValueError(f"`vllm_engine_kwargs` has {name}, which is not free: {OWNED[name]}.")
    guesses = [name for name in GUESSES if given.get(name) is not None]
    if guesses and args.device.type == "cpu":
        raise ValueError(
            f"`vllm_engine_kwargs` has {', '.join(guesses)}, and this training runs on a processor. There vLLM (0.31 "
            "and 0.32) never writes the temperatures of guessed tokens, and so samples something else than the "
            "policy. Leave it out."
        )
    from vllm import EngineArgs

    unknown = sorted(set(given) - {each.name for each in fields(EngineArgs)})
    if unknown:
        raise ValueError(
            f"`vllm_engine_kwargs` has {', '.join(unknown)}, which this vLLM does not know. Remove them, or look for "
            "their names in its `EngineArgs`."
        )
