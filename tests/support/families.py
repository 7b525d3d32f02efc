"""Tiny random models of every family of `docs/models.md`. Used by tests and by `docs/make_models.py`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


WINDOW = 4  # tokens, fewer than the paths of the tests have

_SIZE: dict[str, Any] = {
    "vocab_size": 65,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32 dimensions: the fewest that vLLM has on CPU
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    # of mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# As all checkpoints of DeepSeek-V2 and V3 have it, here 4 times as long as in training.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_ABOUT_LATENT = (
    "right with YaRN, which DeepSeek's own checkpoints have. Without YaRN and with `enforce_eager`, the rotary kernel "
    "of vLLM 0.31 for processors takes each head of a query for a token, and log-probabilities are off by whole nats. "
    "Compiled, as by default, vLLM does not use that kernel, and is right without YaRN too. On processors without "
    "AMX, vLLM computes latent attention without a prefix cache"
)
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}


@dataclass(frozen=True)
class Family:
    """A family of models and what makes a tiny one of it."""

    name: str
    """As users call it."""
    kind: str
    """As transformers calls it: `model_type` of the text config."""
    has: str
    """What its layers have beside full attention; empty for nothing."""
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings of its config beyond the common size."""
    without: tuple[str, ...] = ()
    """Common settings that its config computes by itself."""
    attention: str = "sdpa"
    adapted: Any = "all-linear"
    """`target_modules` of LoRA."""
    served_in: str = "float32"
    """What vLLM computes in on a CPU: some of its kernels know no float32."""
    served_as: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the config that vLLM gets, where it means another thing by them than transformers does."""
    engine_options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Options of vLLM that the family needs on a CPU."""
    about_vllm: str = ""
    """What the page says of vLLM and the family's real checkpoints."""

    def config(self) -> PreTrainedConfig:
        config_class = CONFIG_MAPPING[self.kind]
        names = {name for parent in config_class.__mro__ for name in getattr(parent, "__annotations__", {})}
        names |= set(getattr(config_class, "attribute_map", {}))
        size = {name: value for name, value in _SIZE.items() if name in names and name not in self.without}
        return config_class(**{**size, **self.changes})

    def model(self) -> PreTrainedModel:
        """A random one in float32, in evaluation mode."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config(), attn_implementation=self.attention).eval().float()


FAMILIES = [
    Family("Llama", "llama", ""),
    Family("Qwen2, Qwen2.5", "qwen2", ""),
    Family(
        "Qwen2 with windows",
        "qwen2",
        "windows",
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    Family("Qwen3", "qwen3", "QK norms"),
    Family("Qwen3-MoE", "qwen3_moe", "experts"),
    Family("Mistral", "mistral", "windows", {"sliding_window": WINDOW}),
    Family("Mixtral", "mixtral", "windows, experts", {"sliding_window": WINDOW}),
    Family("Phi-3, Phi-4", "phi3", "windows", {"sliding_window": WINDOW}),
    Family("SmolLM3", "smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    Family("Gemma", "gemma", ""),
    Family("Gemma 2", "gemma2", "windows, soft caps", {**_WINDOWS, "query_pre_attn_scalar": 32}, attention="eager"),
    Family("Gemma 3", "gemma3_text", "windows, QK norms", {**_WINDOWS, "query_pre_attn_scalar": 32}),
    Family(
        "Gemma 4",
        "gemma4_text",
        "windows, head sizes that differ",
        {**_WINDOWS, "global_head_dim": 64, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    Family(
        "Gemma 4 E2B, E4B",
        "gemma4_text",
        "windows, head sizes that differ, shared keys",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 64,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 65,
        },
    ),
    Family("gpt-oss", "gpt_oss", "windows, sinks, experts", {**_WINDOWS, "rope_parameters": None}, attention="eager"),
    Family("OLMo 2", "olmo2", "QK norms"),
    Family("OLMo 3", "olmo3", "windows, QK norms", _WINDOWS),
    Family("Granite 3", "granite", ""),
    Family("GLM-4", "glm4", ""),
    Family(
        "Cohere 2",
        "cohere2",
        "windows",
        {**_WINDOWS, "logit_scale": 1.0},
        served_as={"sliding_window": WINDOW - 1},
        about_vllm="its windows of this family hold one token more than those of transformers, as the code of vLLM "
        "0.31 says that Cohere trained so. They were set one shorter here. A real checkpoint differs only behind its "
        "window of 4,096 tokens, by the oldest token of each window",
    ),
    Family("EXAONE 4", "exaone4", "windows, QK norms", _WINDOWS),
    Family(
        "Llama 4",
        "llama4_text",
        "chunks, experts",
        {
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 64,
            "attn_temperature_tuning": False,
        },
        adapted=_ATTENTION,
    ),
    Family(
        "DeepSeek-V2",
        "deepseek_v2",
        "latent attention, experts",
        # vLLM takes experts by groups wherever a config has groups; transformers only where the method says so.
        {**_LATENT, "topk_method": "group_limited_greedy", "rope_parameters": _YARN},
        ("head_dim",),
        engine_options={"attention_backend": "CPU_MLA"},  # the faster one knows no float32
        about_vllm=_ABOUT_LATENT,
    ),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        "latent attention, experts",
        # vLLM takes a softmax where a config does not name the function; transformers knows the sigmoid alone.
        {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": _YARN},
        ("head_dim",),
        engine_options={"attention_backend": "CPU_MLA"},
        about_vllm=_ABOUT_LATENT,
    ),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        "gated delta nets, experts",
        {**_DELTA, "shared_expert_intermediate_size": 32},
        served_in="bfloat16",
    ),
    Family(
        "Qwen3.5",
        "qwen3_5_text",
        "gated delta nets",
        _DELTA,
        served_in="bfloat16",
        about_vllm="how far transformers in bfloat16 is from float32 was measured on other paths than vLLM's, "
        "those of the transformers engine",
    ),
    Family(
        "LFM2",
        "lfm2",
        "convolutions",
        {
            "layer_types": ["conv", "full_attention"],
            "conv_dim": 64,
            "block_dim": 64,
            "block_auto_adjust_ff_dim": False,
        },
        served_in="bfloat16",
    ),
    Family(
        "Falcon-H1",
        "falcon_h1",
        "Mamba-2 beside attention",
        _MAMBA,
        adapted=[*_ATTENTION, "in_proj", "gate_proj", "up_proj", "down_proj"],
        served_in="bfloat16",
    ),
    Family(
        "Mamba-2",
        "mamba2",
        "Mamba-2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
        attention="eager",
        adapted=["in_proj"],
        served_in="bfloat16",
    ),
    Family(
        "Bamba",
        "bamba",
        "Mamba-2, attention",
        {**_MAMBA, "mamba_n_heads": 8, "attn_layer_indices": [1]},
        served_in="bfloat16",
    ),
    Family(
        "GPT-2",
        "gpt2",
        "absolute positions",
        {
            "n_embd": 64,
            "n_head": 2,
            "n_layer": 2,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
]
FAMILY = {family.name: family for family in FAMILIES}
