"""The plan's bytes against real tensors and by hand, and what it says of a card that is too small."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DeepseekV3Config
from trl import ModelConfig

from tests.support.models import make_model
from treepo_trl import TreePOConfig
from treepo_trl.memory import GIB, MemoryPlan, plan_memory
from treepo_trl.memory.plan import RESERVE


def arguments(tmp_path: Path, **changes: Any) -> TreePOConfig:
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": True}
    settings |= {"per_device_train_batch_size": 8, "max_completion_length": 100, "vllm_max_model_length": 120}
    return TreePOConfig(output_dir=str(tmp_path), **{**settings, **changes})


def plan(tmp_path: Path, folder: str, card_gib: float = 24, lora: bool = True, **changes: Any) -> MemoryPlan:
    names = ("dtype", "load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "lora_r")
    model = {name: changes.pop(name) for name in names if name in changes}
    if lora:
        model |= {"use_peft": True, "lora_target_modules": ["all-linear"]}
    config = AutoConfig.from_pretrained(folder)
    model_args = ModelConfig(folder, **{"dtype": "bfloat16", **model})
    return plan_memory(config, arguments(tmp_path, **changes), model_args, card_gib * GIB)


# Weights, adapter and optimizer against the real ones


def nbytes_4bit(model: Any) -> int:
    """Everything that the weights of a loaded 4-bit model take."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.mark.parametrize("nested", [False, True])
def test_weights_in_4_bits(tmp_path: Path, small_model_dir: str, nested: bool) -> None:
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, quantization_config=four_bits, dtype="bfloat16")
    result = plan(tmp_path, small_model_dir, load_in_4bit=True, use_bnb_nested_quant=nested)
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-3)
    # TRL keeps this adapter in bfloat16.
    adapter = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert result.policy["adapter"] == result.policy["gradients"] == 2 * trainable
    assert result.policy["optimizer"] == 4 * trainable


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.3", "down_proj"]])
def test_a_checkpoint_in_4_bits(tmp_path: Path, small_model_dir: str, skipped: list[str] | None) -> None:
    """Given as the model, with `llm_int8_skip_modules` or without."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, quantization_config=four_bits, dtype="bfloat16")
    model.save_pretrained(tmp_path / "model")
    vllm = {"use_vllm": True, "vllm_mode": "colocate"}
    result = plan(tmp_path, str(tmp_path / "model"), 0.6, **vllm)
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-3)
    assert result.base_weights == (
        "quantized" if skipped is None else "dequantized"
    )  # of a mixture vLLM has no layers


def test_weights_and_adapter_in_16_bits(tmp_path: Path, small_model_dir: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype="bfloat16")
    weights = sum(p.nbytes for p in model.parameters())
    adapter = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    trainable = [p for p in adapter.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    result = plan(tmp_path, small_model_dir, lora_r=8)
    assert result.policy["weights"] == weights
    assert result.policy["adapter"] == sum(p.nbytes for p in trainable)
    assert result.policy["optimizer"] == 2 * result.policy["adapter"]
    eight_bits = plan(tmp_path, small_model_dir, lora_r=8, optim="adamw_8bit")
    assert eight_bits.policy["optimizer"] == 2 * sum(p.numel() for p in trainable)


def test_full_fine_tuning_has_gradients_and_moments_of_every_weight(tmp_path: Path, small_model_dir: str) -> None:
    result = plan(tmp_path, small_model_dir, lora=False, dtype="float32")
    assert "adapter" not in result.policy
    assert result.policy["gradients"] == result.policy["weights"]
    assert result.policy["optimizer"] == 2 * result.policy["weights"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_shared_base_is_in_the_engine_alone(tmp_path: Path, small_model_dir: str, nested: bool) -> None:
    vllm = {"use_vllm": True, "vllm_mode": "colocate"}
    model = {"load_in_4bit": True, "use_bnb_nested_quant": nested}
    twice = plan(tmp_path, small_model_dir, **vllm, **model, vllm_base_weights="quantized")
    once = plan(tmp_path, small_model_dir, **vllm, **model, vllm_share_base_weights=True)
    assert (twice.shares, once.shares) == (False, True)
    assert once.base_weights == "quantized"
    assert once.engine == twice.engine
    # What is left are the scales: one of 8 bits per block of 64 weights or of 32, and a second level.
    linear = 106_168_320  # of SmolLM2-135M: 30 layers of 576 x (2 x 576 + 2 x 192 + 3 x 1536)
    assert linear == 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert once.engine["weights"] == 2 * (49152 * 576 + 61 * 576) + linear * (1 / 2 + 1 / 16)
    assert once.policy["weights"] == pytest.approx(linear * ((1 + 4 / 256) if nested else 4) / 64, rel=1e-6)
    assert twice.rollout - once.rollout == twice.policy["weights"] - once.policy["weights"]
    assert plan(tmp_path, small_model_dir, **vllm, vllm_share_base_weights=True).policy["weights"] == 0


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"lora": False}])
def test_sharing_is_planned_where_the_trainer_has_it(
    tmp_path: Path, small_model_dir: str, changes: dict[str, Any]
) -> None:
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_share_base_weights": True}
    with pytest.raises(ValueError, match=r"needs an adapter \(`--use_peft`\) on a base that vLLM has alike"):
        plan(tmp_path, small_model_dir, **vllm, **changes)
    # In 4 bits these weights are shared, and embeddings and norms in float32 are not.
    mixed = plan(tmp_path, small_model_dir, **vllm, dtype="float32", load_in_4bit=True, use_bnb_nested_quant=False)
    embeddings_and_norms = 49152 * 576 + 61 * 576
    assert mixed.policy["weights"] == 4 * embeddings_and_norms + 106_168_320 / 16
    assert mixed.engine["weights"] == 2 * embeddings_and_norms + 106_168_320 * (1 / 2 + 1 / 16)


def test_layers_in_full_precision_keep_a_4_bit_policy_from_sharing(tmp_path: Path, small_model_dir: str) -> None:
    config = AutoConfig.from_pretrained(small_model_dir)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    config.quantization_config = four_bits.to_dict()
    args = arguments(tmp_path, use_vllm=True, vllm_mode="colocate", vllm_share_base_weights=True)
    model_args = ModelConfig(small_model_dir, dtype="bfloat16", use_peft=True, lora_target_modules=["all-linear"])
    with pytest.raises(ValueError, match="all linear layers but the head in 4 bits"):
        plan_memory(config, args, model_args, 24 * GIB)


def test_what_a_sleeping_engine_leaves(tmp_path: Path, small_model_dir: str) -> None:
    vllm = {"use_vllm": True, "vllm_mode": "colocate"}
    awake = plan(tmp_path, small_model_dir, **vllm)
    asleep = plan(tmp_path, small_model_dir, **vllm, vllm_enable_sleep_mode=True)
    kept = plan(tmp_path, small_model_dir, **vllm, vllm_enable_sleep_mode=True, vllm_sleep_keeps_weights=True)
    shared = plan(tmp_path, small_model_dir, **vllm, vllm_enable_sleep_mode=True, vllm_share_base_weights=True)
    assert awake.update - asleep.update == sum(awake.engine.values())
    assert kept.update - asleep.update == kept.engine["weights"]
    assert shared.update == asleep.update  # one copy in either: the engine's, or the policy's own
    assert "vLLM's cache leaves the card" in kept.table()
    assert "vLLM leaves the card" in asleep.table()


def test_advice_to_share_where_it_helps(tmp_path: Path, small_model_dir: str) -> None:
    vllm = {"use_vllm": True, "vllm_mode": "colocate"}
    advice = "`vllm_share_base_weights"
    small = plan(tmp_path, small_model_dir, 0.5, **vllm)
    assert len(small.problems()) >= 2
    assert all(advice in problem for problem in small.problems()[:2])
    assert advice not in str(plan(tmp_path, small_model_dir, 0.5, **vllm, vllm_share_base_weights=True).problems())
    # Nor where it would be refused.
    refused = [{"lora": False}, {"dtype": "float32"}, {"vllm_lora_sync": "merge"}, {"vllm_tensor_parallel_size": 2}]
    refused.append({"load_in_4bit": True, "vllm_base_weights": "dequantized"})
    for changes in refused:
        tight = plan(tmp_path, small_model_dir, 0.5, **vllm, **changes)
        assert tight.problems()
        assert advice not in str(tight.problems()), changes


# Activations


def test_activations_grow_with_tokens_and_shrink_with_checkpoints(tmp_path: Path, small_model_dir: str) -> None:
    def activations(**changes: Any) -> float:
        return plan(tmp_path, small_model_dir, **changes).policy["activations"]

    whole = activations()  # 8 rows of 120 tokens
    assert plan(tmp_path, small_model_dir).micro_batch_tokens == 960
    assert activations(per_device_train_batch_size=16) == pytest.approx(2 * whole, rel=0.05)
    assert activations(max_tokens_per_micro_batch=480) == pytest.approx(whole / 2, rel=0.05)
    assert activations(gradient_checkpointing=False) > 3 * whole
    # A single row may be longer than the budget.
    assert plan(tmp_path, small_model_dir, max_tokens_per_micro_batch=50).micro_batch_tokens == 120


# The engine


def test_engine_and_cache_by_hand(tmp_path: Path, small_model_dir: str) -> None:
    result = plan(tmp_path, small_model_dir, card_gib=4, use_vllm=True, vllm_mode="colocate")
    share = 0.3 * 4 * GIB  # TRL's default of `vllm_gpu_memory_utilization`
    assert sum(result.engine.values()) == pytest.approx(share)
    # SmolLM2-135M: 30 layers, 3 heads of 64 for keys and values, 2 bytes each.
    per_token = 2 * 30 * 3 * 64 * 2
    assert result.cache_tokens == int((share - result.engine["weights"]) // per_token)
    assert result.engine["weights"] == result.policy["weights"]
    assert result.update == pytest.approx(sum(result.policy.values()) + share + RESERVE)
    asleep = plan(
        tmp_path, small_model_dir, card_gib=4, use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=True
    )
    assert asleep.update == pytest.approx(sum(result.policy.values()) + RESERVE)
    assert asleep.rollout == result.rollout


@pytest.mark.parametrize(
    ("card_gib", "wanted", "expected"),
    [(24, "auto", "dequantized"), (0.9, "auto", "quantized"), (24, "quantized", "quantized")],
)
def test_base_of_a_4_bit_policy(
    tmp_path: Path, small_model_dir: str, card_gib: float, wanted: str, expected: str
) -> None:
    result = plan(
        tmp_path,
        small_model_dir,
        card_gib=card_gib,
        load_in_4bit=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_base_weights=wanted,
    )
    assert result.base_weights == expected
    plain = plan(tmp_path, small_model_dir).policy["weights"]
    # vLLM keeps the scales of its 4-bit weights in float32, as a policy without double quantization does.
    in_4bit = plan(tmp_path, small_model_dir, load_in_4bit=True).policy["weights"]
    assert result.engine["weights"] == pytest.approx(plain if expected == "dequantized" else in_4bit)


def test_engine_holds_16_bits_of_a_float32_policy_and_the_models_whole_context(
    tmp_path: Path, small_model_dir: str
) -> None:
    changes = {"use_vllm": True, "vllm_mode": "colocate"}
    wide = plan(tmp_path, small_model_dir, dtype="float32", vllm_max_model_length=None, **changes)
    assert wide.engine["weights"] == wide.policy["weights"] / 2
    assert wide.longest == AutoConfig.from_pretrained(small_model_dir).max_position_embeddings
    # What the trainer loads the model with goes before the script's own argument.
    narrow = plan(tmp_path, small_model_dir, dtype="float32", model_init_kwargs={"dtype": "bfloat16"})
    assert narrow.policy["weights"] == wide.policy["weights"] / 2


def test_a_kl_term_needs_a_reference_model_without_an_adapter(tmp_path: Path, small_model_dir: str) -> None:
    full = plan(tmp_path, small_model_dir, lora=False, beta=0.1)
    assert full.policy["reference model"] == full.policy["weights"]
    assert "reference model" not in plan(tmp_path, small_model_dir, beta=0.1).policy


def test_latent_attention_and_experts(tmp_path: Path) -> None:
    """Its cache is one vector per token and layer; experts are counted with the weights."""
    config = DeepseekV3Config(
        vocab_size=65,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    with torch.device("meta"):
        numel = AutoModelForCausalLM.from_config(config).num_parameters()
    args = arguments(tmp_path, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.5)
    model_args = ModelConfig("x", dtype="bfloat16", use_peft=True, lora_target_modules=["o_proj", "kv_b_proj"])
    result = plan_memory(config, args, model_args, GIB)
    assert result.policy["weights"] == result.engine["weights"] == 2 * numel
    assert result.cache_tokens == (GIB // 2 - 2 * numel) // (2 * 2 * (8 + 8))
    # A shared base has the experts twice: in one layer of the two, 4 x 3 matrices of 64 x 32.
    args.vllm_share_base_weights = True
    assert plan_memory(config, args, model_args, GIB).policy["weights"] == 2 * 4 * 3 * 64 * 32
    # In 4 bits vLLM has no such experts.
    in_4bit = ModelConfig(
        "x", dtype="bfloat16", load_in_4bit=True, use_peft=True, lora_target_modules=["o_proj", "kv_b_proj"]
    )
    with pytest.raises(ValueError, match="needs an adapter"):
        plan_memory(config, args, in_4bit, GIB)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_head_in_4_bits_and_other_storage(tmp_path: Path, storage: str) -> None:
    """Neither has vLLM."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=["none"] if storage == "uint8" else None,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four_bits, dtype="bfloat16")
    is_4bit = type(model.lm_head).__name__ == "Linear4bit"
    assert is_4bit is (storage == "uint8")
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    config.quantization_config = four_bits.to_dict()
    args = arguments(tmp_path, use_vllm=True, vllm_mode="colocate")
    model_args = ModelConfig("x", dtype="bfloat16", use_peft=True, lora_target_modules=["all-linear"])
    result = plan_memory(config, args, model_args, 0.12 * GIB)
    assert result.base_weights == "dequantized"
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-2)
    args.vllm_share_base_weights = True
    with pytest.raises(ValueError, match="needs an adapter"):
        plan_memory(config, args, model_args, GIB)


def test_the_engine_has_the_checkpoints_precision(tmp_path: Path, small_model_dir: str) -> None:
    config = AutoConfig.from_pretrained(small_model_dir)
    assert config.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"the checkpoint's 16 bits .* this is torch\.float16"):
        plan(
            tmp_path,
            small_model_dir,
            dtype="float16",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_share_base_weights=True,
        )


@pytest.mark.parametrize("changes", [{"load_in_8bit": True}, {"model_init_kwargs": {"quantization_config": {}}}])
def test_other_quantizations_are_not_planned(tmp_path: Path, small_model_dir: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not planned yet"):
        plan(tmp_path, small_model_dir, **changes)


def test_checkpoints_quantized_by_others_are_not_planned(tmp_path: Path, small_model_dir: str) -> None:
    config = AutoConfig.from_pretrained(small_model_dir)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized by 'gptq'; only 4 bits of bitsandbytes are planned yet"):
        plan_memory(config, arguments(tmp_path), ModelConfig(small_model_dir), 24 * GIB)


# What it says


def test_what_does_not_fit_names_the_settings(tmp_path: Path, small_model_dir: str) -> None:
    changes = {"use_vllm": True, "vllm_mode": "colocate"}
    assert plan(tmp_path, small_model_dir, card_gib=4, **changes).problems() == []
    tight = plan(tmp_path, small_model_dir, card_gib=2.7, **changes)
    (problem,) = tight.problems()
    assert "The update takes" in problem
    assert "of the card's 2.7" in problem
    assert "`vllm_enable_sleep_mode=True`" in problem
    assert tight.impossible() is None  # what is certain fits
    tiny = plan(tmp_path, small_model_dir, card_gib=0.2, **changes)
    assert len(tiny.problems()) == 3
    assert "vLLM's cache holds at most 0 tokens, one prompt with its completion may have 120" in tiny.problems()[2]
    assert "weights and gradients take 0.3 GiB, the card has 0.2" in str(tiny.impossible())


def test_a_card_in_bytes_is_an_error(tmp_path: Path, small_model_dir: str) -> None:
    with pytest.raises(ValueError, match="`--card_gib 24`"):
        plan(tmp_path, small_model_dir, card_gib=24 / GIB)
