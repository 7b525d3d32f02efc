"""What the user may say about the engine beside TRL's settings."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl.generation.vllm_generation import VLLMGeneration

from treepo_trl import TreePOConfig
from treepo_trl.engines.vllm import cache_options
from treepo_trl.policy.engine_options import GUESSES, OWNED, check_engine_options, engine_options


FREE = """
additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization allowed_local_media_path
allowed_media_domains async_scheduling attention_backend attention_config aux_output_config block_size
code_revision collect_detailed_traces compilation_config config_format cp_kv_cache_interleave_size
cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params cudagraph_capture_sizes cudagraph_metrics
dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size
dcp_q_replicate decode_context_parallel_size disable_cascade_attn disable_chunked_mm_input
disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats disable_nccl_for_dp_synchronization
disable_sliding_window distributed_timeout_seconds download_dir dp_sync_interval dtype ec_manager_config
ec_transfer_config enable_batch_sharded_sampling enable_chunked_prefill enable_cumem_allocator enable_dbo
enable_ep_weight_filter enable_eplb enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune
enable_layerwise_nvtx_tracing enable_logging_iteration_details enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_prompt_embeds
enable_return_routed_experts enable_tower_connector_lora enable_trace_replay enforce_eager engram_config
eplb_config expert_placement_strategy fail_on_environ_validation fault_tolerance_config fully_sharded_loras
gdn_prefill_backend generation_config hf_token ignore_patterns interleave_mm_strings io_processor_plugin
ir_op_priority jit_monitor_mode jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config
kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample kv_events_config
kv_sharing_fast_prefill language_model_only limit_mm_per_prompt linear_backend log_config_file log_level
logging_config long_prefill_token_threshold long_prefill_token_threshold_adaptive lora_dtype mamba_backend
mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype
mamba_ssu_algorithm max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_num_active_seqs
max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
max_parallel_loading_workers media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype
mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type
mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc model_loader_extra_config
moe_backend numa_bind numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group
offload_params offload_prefetch_step optimization_level otlp_traces_endpoint override_generation_config
per_request_spec_decode_metrics performance_mode pooler_config prefill_schedule_interval
prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit profiler_config pt_load_map_location
ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin renderer_num_workers
replayssm_buffer_len return_sampling_mask safetensors_load_strategy safetensors_prefetch_block_size
safetensors_prefetch_num_threads scheduler_cls scheduler_reserve_full_isl scheduling_policy served_model_name
show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling sparse_indexer_topk_backend spec_method
spec_model spec_tokens specialize_active_lora speculative_config stream_interval structured_outputs_config
swa_bounded_replay tokenizer_mode ubatch_size use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method
video_pruning_rate watermark worker_extension_cls
"""
"""
Arguments of vLLM 0.31 that were read, and are the user's.

They say how fast, in what numbers, in what order or with what logs the engine computes the same, or are about what
trees never use: images, pooling, default sampling parameters, a server's own requests. A wrong value fails when the
engine is built, or `engine_check` sees it.
"""
FREE_LATER = """
custom_histogram_buckets enable_hc_sp enable_shm_tensor_arena sleep_mode_offload_cudagraph
cache_aware_admission_threshold cache_aware_admission_window max_num_inflight_kv_loads monokernel
shuffle_safetensors_files watchdog_config
"""
"""The same of 0.32, in the first line, and of 0.34."""


def make(folder: Path, **changes: Any) -> TreePOConfig:
    return TreePOConfig(str(folder), **{"use_cpu": True, "bf16": False, "report_to": [], "use_vllm": True, **changes})


def test_the_engine_computes_in_what_mixed_precision_says(tmp_path: Path) -> None:
    def dtype(**changes: Any) -> object:
        return engine_options(make(tmp_path, **changes)).get("dtype")

    assert dtype() is None
    assert dtype(bf16=True) == "bfloat16"
    assert dtype(fp16=True) == "float16"
    assert dtype(fp16=True, vllm_engine_kwargs={"dtype": "float32"}) == "float32"


def test_decoded_segments_stay_in_the_cache_of_all_layers_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    name = "prefix_cache_retention_interval"
    retention = {name: None} if hasattr(EngineArgs, name) else {}
    assert engine_options(make(tmp_path)) == {"block_size": 32, **retention}
    own = {name: 0, "block_size": 64, "seed_of_nothing": 1}
    assert engine_options(make(tmp_path, vllm_engine_kwargs=own)) == own


def test_blocks_of_a_card_are_vllms(tmp_path: Path) -> None:
    """16 tokens there; on a processor 128, which is longer than many segments."""
    assert "block_size" not in cache_options(on_processor=False)


@pytest.mark.parametrize("name", OWNED)
def test_what_the_trainer_sets_is_refused_with_the_setting_to_use(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`vllm_engine_kwargs` has {name}, which is not free: "):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={name: 1}))


def test_what_trl_gives_the_engine_is_not_the_users() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(VLLMGeneration))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM"
    ]
    (call,) = calls
    given = {keyword.arg for keyword in call.keywords}
    assert len(given) > 10
    assert given - set(OWNED) == {"max_num_batched_tokens"}  # TRL's guess at a good size; the user may know better


def test_every_argument_of_vllm_was_looked_at() -> None:
    """A new one is put into `OWNED` if it changes what the trainer has planned, checked or set; else into `FREE`."""
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    known, free = {each.name for each in fields(EngineArgs)}, set(FREE.split()) | set(FREE_LATER.split())
    assert known - set(OWNED) - free == set()
    assert set(OWNED) & free == set()
    assert set(GUESSES) <= free


@pytest.mark.parametrize(
    "name",
    [
        *("kv_cache_memory_bytes", "num_gpu_blocks_override", "kv_offloading_size", "kv_transfer_config"),
        *("model_weights", "hf_overrides", "quantization_config", "skip_tokenizer_init", "tokens_only"),
        *("lora_target_modules", "logits_processors", "watermark_config", "data_parallel_rank", "device_ids"),
    ],
)
def test_what_changes_the_engine_behind_the_trainers_back_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"`vllm_engine_kwargs` has {name}, which is not free: "):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={name: 1}))


def test_settings_that_are_named_exist() -> None:
    named = {word.strip("`") for text in OWNED.values() for word in text.split() if word.startswith("`vllm_")}
    assert named <= {*TreePOConfig.__dataclass_fields__}
    assert len(named) > 5


@pytest.mark.parametrize(
    "guesses",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
        {"spec_method": "ngram", "spec_tokens": 4},
        {"spec_model": "smaller"},
        {"spec_tokens": 4},
    ],
)
def test_guessed_tokens_are_refused_on_a_processor(tmp_path: Path, guesses: dict[str, object]) -> None:
    """For a fault of vLLM that `tests/engines/test_vllm.py` shows."""
    with pytest.raises(ValueError, match=f"has {', '.join(guesses)}, and this training runs on a processor"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs=guesses))


def test_arguments_of_guesses_that_are_none_guess_nothing(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    known = {each.name for each in fields(EngineArgs)}
    check_engine_options(make(tmp_path, vllm_engine_kwargs=dict.fromkeys(known & {*GUESSES})))


def test_names_that_vllm_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cache_dtype": "auto"}))
    with pytest.raises(ValueError, match="has kv_cash_dtype, which this vLLM does not know"):
        check_engine_options(make(tmp_path, vllm_engine_kwargs={"kv_cash_dtype": "auto"}))
