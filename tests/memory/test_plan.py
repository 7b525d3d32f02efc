"""The plan's bytes against real tensors and by hand, and what it says of a card that is too small."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DeepseekV3Config, PreTrainedConfig
from trl import ModelConfig

from tests.support.families import FAMILY
from tests.support.models import make_model
from treepo_trl import TreePOConfig
from treepo_trl.memory import GIB, MemoryPlan, plan_memory
from treepo_trl.memory.plan import RESERVE


Plan = Callable[..., MemoryPlan]

LORA = {"use_peft": True, "lora_target_modules": ["all-linear"]}
VLLM = {"use_vllm": True, "vllm_mode": "colocate"}
SHARED = {**VLLM, "vllm_share_base_weights": True}
# Weights of SmolLM2-135M: those of the linear layers, and embeddings with norms.
LINEAR, OTHERS = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536), 49152 * 576 + 61 * 576
MODEL_OPTIONS = ("dtype", "load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "lora_r")


def arguments(**changes: Any) -> TreePOConfig:
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": True}
    settings |= {"per_device_train_batch_size": 8, "max_completion_length": 100, "vllm_max_model_length": 120}
    return TreePOConfig("unused", **{**settings, **changes})


@pytest.fixture
def config(small_model_dir: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(small_model_dir)


@pytest.fixture
def plan(config: PreTrainedConfig) -> Plan:
    """The plan of a training of the small model, or of that of another config."""

    def plan(
        card_gib: float = 24, config: PreTrainedConfig = config, lora: dict[str, Any] | None = LORA, **changes: Any
    ) -> MemoryPlan:
        options = {name: changes.pop(name) for name in MODEL_OPTIONS if name in changes}
        model_args = ModelConfig("x", **{"dtype": "bfloat16", **(lora or {}), **options})
        return plan_memory(config, arguments(**changes), model_args, card_gib * GIB)

    return plan


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


def load_4bit(folder: str | Path, **settings: Any) -> Any:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype="bfloat16")


@pytest.mark.parametrize("nested", [False, True])
def test_weights_in_4_bits(plan: Plan, small_model_dir: str, nested: bool) -> None:
    model = load_4bit(small_model_dir, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    result = plan(load_in_4bit=True, use_bnb_nested_quant=nested)
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-3)
    # TRL keeps this adapter in bfloat16.
    adapter = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert result.policy["adapter"] == result.policy["gradients"] == 2 * trainable
    assert result.policy["optimizer"] == 4 * trainable


@pytest.mark.parametrize(
    ("skipped", "base"),  # of a mixture vLLM has no layers
    [(None, "quantized"), (["lm_head", "model.layers.3", "down_proj"], "dequantized")],
)
def test_a_checkpoint_in_4_bits(
    plan: Plan, tmp_path: Path, small_model_dir: str, skipped: list[str] | None, base: str
) -> None:
    """Given as the model, with `llm_int8_skip_modules` or without."""
    settings = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": skipped}
    model = load_4bit(small_model_dir, **settings)
    model.save_pretrained(tmp_path)
    result = plan(0.6, AutoConfig.from_pretrained(tmp_path), **VLLM)
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-3)
    assert result.base_weights == base


def test_weights_and_adapter_in_16_bits(plan: Plan, small_model_dir: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype="bfloat16")
    weights = sum(p.nbytes for p in model.parameters())
    adapter = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    trainable = [p for p in adapter.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    result = plan(lora_r=8)
    assert result.policy["weights"] == weights
    assert result.policy["adapter"] == sum(p.nbytes for p in trainable)
    assert result.policy["optimizer"] == 2 * result.policy["adapter"]
    eight_bits = plan(lora_r=8, optim="adamw_8bit")
    assert eight_bits.policy["optimizer"] == 2 * sum(p.numel() for p in trainable)


def test_full_fine_tuning_has_gradients_and_moments_of_every_weight(plan: Plan) -> None:
    result = plan(lora=None, dtype="float32")
    assert "adapter" not in result.policy
    assert result.policy["gradients"] == result.policy["weights"]
    assert result.policy["optimizer"] == 2 * result.policy["weights"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_shared_base_is_in_the_engine_alone(plan: Plan, nested: bool) -> None:
    model = {"load_in_4bit": True, "use_bnb_nested_quant": nested}
    twice = plan(**VLLM, **model, vllm_base_weights="quantized")
    once = plan(**SHARED, **model)
    assert (twice.shares, once.shares) == (False, True)
    assert once.base_weights == "quantized"
    assert once.engine == twice.engine
    # What is left are the scales: one of 8 bits per block of 64 weights or of 32, and a second level.
    assert once.engine["weights"] == 2 * OTHERS + LINEAR * (1 / 2 + 1 / 16)
    assert once.policy["weights"] == pytest.approx(LINEAR * ((1 + 4 / 256) if nested else 4) / 64, rel=1e-6)
    assert twice.rollout - once.rollout == twice.policy["weights"] - once.policy["weights"]
    assert plan(**SHARED).policy["weights"] == 0


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"dtype": "float32"}, "float32"), ({"dtype": "float16"}, "float16"), ({"lora": None}, "bfloat16")],
)
def test_sharing_is_planned_where_the_trainer_has_it(plan: Plan, changes: dict[str, Any], dtype: str) -> None:
    """The checkpoint has bfloat16."""
    words = r"needs an adapter \(`--use_peft`\) on a base that vLLM has alike.*the checkpoint's 16 bits"
    with pytest.raises(ValueError, match=rf"{words} .* this is torch\.{dtype}"):
        plan(**SHARED, **changes)


def test_a_shared_base_in_4_bits_leaves_embeddings_and_norms_in_float32(plan: Plan) -> None:
    mixed = plan(**SHARED, dtype="float32", load_in_4bit=True, use_bnb_nested_quant=False)
    assert mixed.policy["weights"] == 4 * OTHERS + LINEAR / 16
    assert mixed.engine["weights"] == 2 * OTHERS + LINEAR * (1 / 2 + 1 / 16)


def test_layers_in_full_precision_keep_a_4_bit_policy_from_sharing(plan: Plan, config: PreTrainedConfig) -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    config.quantization_config = four_bits.to_dict()
    with pytest.raises(ValueError, match="all linear layers but the head in 4 bits"):
        plan(**SHARED)


def test_what_a_sleeping_engine_leaves(plan: Plan) -> None:
    awake = plan(**VLLM)
    asleep = plan(**VLLM, vllm_enable_sleep_mode=True)
    kept = plan(**VLLM, vllm_enable_sleep_mode=True, vllm_sleep_keeps_weights=True)
    shared = plan(**SHARED, vllm_enable_sleep_mode=True)
    assert awake.update - asleep.update == sum(awake.engine.values())
    assert kept.update - asleep.update == kept.engine["weights"]
    assert shared.update == asleep.update  # one copy in either: the engine's, or the policy's own
    assert "vLLM's cache leaves the card" in kept.table()
    assert "vLLM leaves the card" in asleep.table()


def test_advice_to_share_where_it_helps(plan: Plan) -> None:
    advice = "`vllm_share_base_weights"
    small = plan(0.5, **VLLM)
    assert len(small.problems()) >= 2
    assert all(advice in problem for problem in small.problems()[:2])
    assert advice not in str(plan(0.5, **SHARED).problems())
    # Nor where it would be refused.
    refused = [{"lora": None}, {"dtype": "float32"}, {"vllm_lora_sync": "merge"}, {"vllm_tensor_parallel_size": 2}]
    refused.append({"load_in_4bit": True, "vllm_base_weights": "dequantized"})
    for changes in refused:
        tight = plan(0.5, **VLLM, **changes)
        assert tight.problems()
        assert advice not in str(tight.problems()), changes


# Activations


def test_activations_grow_with_tokens_and_shrink_with_checkpoints(plan: Plan) -> None:
    def activations(**changes: Any) -> float:
        return plan(**changes).policy["activations"]

    whole = activations()  # 8 rows of 120 tokens
    assert plan().micro_batch_tokens == 960
    assert activations(per_device_train_batch_size=16) == pytest.approx(2 * whole, rel=0.05)
    assert activations(max_tokens_per_micro_batch=480) == pytest.approx(whole / 2, rel=0.05)
    assert activations(gradient_checkpointing=False) > 3 * whole
    # A single row may be longer than the budget.
    assert plan(max_tokens_per_micro_batch=50).micro_batch_tokens == 120


# The engine


def test_dropout_that_is_off_keeps_nothing(plan: Plan) -> None:
    lora = {**LORA, "lora_dropout": 0.05}
    on, off = (plan(lora=lora, disable_dropout=disabled).policy["activations"] for disabled in (False, True))
    assert on > off == plan(lora={**LORA, "lora_dropout": 0.0}).policy["activations"]


def test_engine_and_cache_by_hand(plan: Plan) -> None:
    result = plan(4, **VLLM)
    share = 0.3 * 4 * GIB  # TRL's default of `vllm_gpu_memory_utilization`
    assert sum(result.engine.values()) == pytest.approx(share)
    # SmolLM2-135M: 30 layers, 3 heads of 64 for keys and values, 2 bytes each.
    per_token = 2 * 30 * 3 * 64 * 2
    assert result.cache_tokens == int((share - result.engine["weights"]) // per_token)
    assert result.engine["weights"] == result.policy["weights"]
    assert result.update == pytest.approx(sum(result.policy.values()) + share + RESERVE)
    asleep = plan(4, **VLLM, vllm_enable_sleep_mode=True)
    assert asleep.update == pytest.approx(sum(result.policy.values()) + RESERVE)
    assert asleep.rollout == result.rollout


@pytest.mark.parametrize(
    ("card_gib", "wanted", "expected"),
    [(24, "auto", "dequantized"), (0.9, "auto", "quantized"), (24, "quantized", "quantized")],
)
def test_base_of_a_4_bit_policy(plan: Plan, card_gib: float, wanted: str, expected: str) -> None:
    result = plan(card_gib, load_in_4bit=True, **VLLM, vllm_base_weights=wanted)
    assert result.base_weights == expected
    plain = plan().policy["weights"]
    # vLLM keeps the scales of its 4-bit weights in float32, as a policy without double quantization does.
    in_4bit = plan(load_in_4bit=True).policy["weights"]
    assert result.engine["weights"] == pytest.approx(plain if expected == "dequantized" else in_4bit)


def test_engine_holds_16_bits_of_a_float32_policy_and_the_models_whole_context(
    plan: Plan, config: PreTrainedConfig
) -> None:
    wide = plan(dtype="float32", vllm_max_model_length=None, **VLLM)
    assert wide.engine["weights"] == wide.policy["weights"] / 2
    assert wide.longest == config.max_position_embeddings
    # What the trainer loads the model with goes before the script's own argument.
    narrow = plan(dtype="float32", model_init_kwargs={"dtype": "bfloat16"})
    assert narrow.policy["weights"] == wide.policy["weights"] / 2


def test_a_kl_term_needs_a_reference_model_without_an_adapter(plan: Plan) -> None:
    full = plan(lora=None, beta=0.1)
    assert full.policy["reference model"] == full.policy["weights"]
    assert "reference model" not in plan(beta=0.1).policy


def test_latent_attention_and_experts(plan: Plan) -> None:
    """Its cache is one vector per token and layer; experts are counted with the weights."""
    sizes: dict[str, Any] = {"vocab_size": 65, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    config = DeepseekV3Config(**sizes)
    with torch.device("meta"):
        numel = AutoModelForCausalLM.from_config(config).num_parameters()
    lora = {"use_peft": True, "lora_target_modules": ["o_proj", "kv_b_proj"]}
    result = plan(1, config, lora, **VLLM, vllm_gpu_memory_utilization=0.5)
    assert result.policy["weights"] == result.engine["weights"] == 2 * numel
    assert result.cache_tokens == (GIB // 2 - 2 * numel) // (2 * 2 * (8 + 8))
    # A shared base has the experts twice: in one layer of the two, 4 x 3 matrices of 64 x 32.
    assert plan(1, config, lora, **SHARED).policy["weights"] == 2 * 4 * 3 * 64 * 32
    # In 4 bits vLLM has no such experts.
    with pytest.raises(ValueError, match="needs an adapter"):
        plan(1, config, lora, **SHARED, load_in_4bit=True)


def test_a_cache_of_layers_with_different_heads(plan: Plan) -> None:
    """One key head a layer: of 32 dimensions in the first, of 64 in the second."""
    result = plan(1, FAMILY["Gemma 4"].config(), **VLLM, vllm_gpu_memory_utilization=0.5)
    assert result.cache_tokens == (GIB // 2 - result.engine["weights"]) // (2 * 2 * (32 + 64))


@pytest.mark.parametrize(("storage", "skipped"), [("uint8", ["none"]), ("bfloat16", None)])
def test_a_head_in_4_bits_and_other_storage(
    plan: Plan, tmp_path: Path, storage: str, skipped: list[str] | None
) -> None:
    """Neither has vLLM."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_4bit(tmp_path, bnb_4bit_quant_storage=storage, llm_int8_skip_modules=skipped)
    assert (type(model.lm_head).__name__ == "Linear4bit") is (storage == "uint8")
    result = plan(0.12, model.config, **VLLM)
    assert result.base_weights == "dequantized"
    assert result.policy["weights"] == pytest.approx(nbytes_4bit(model), rel=1e-2)
    with pytest.raises(ValueError, match="needs an adapter"):
        plan(1, model.config, **SHARED)


@pytest.mark.parametrize("changes", [{"load_in_8bit": True}, {"model_init_kwargs": {"quantization_config": {}}}])
def test_other_quantizations_are_not_planned(plan: Plan, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not planned yet"):
        plan(**changes)


def test_checkpoints_quantized_by_others_are_not_planned(plan: Plan, config: PreTrainedConfig) -> None:
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized by 'gptq'; only 4 bits of bitsandbytes are planned yet"):
        plan(lora=None)


# What it says


def test_what_does_not_fit_names_the_settings(plan: Plan) -> None:
    assert plan(4, **VLLM).problems() == []
    tight = plan(2.7, **VLLM)
    (problem,) = tight.problems()
    assert "The update takes" in problem
    assert "of the card's 2.7" in problem
    assert "`vllm_enable_sleep_mode=True`" in problem
    assert tight.impossible() is None  # what is certain fits
    tiny = plan(0.2, **VLLM)
    assert len(tiny.problems()) == 3
    assert "vLLM's cache holds at most 0 tokens, one prompt with its completion may have 120" in tiny.problems()[2]
    assert "weights and gradients take 0.3 GiB, the card has 0.2" in str(tiny.impossible())


def test_a_card_in_bytes_is_an_error(plan: Plan) -> None:
    with pytest.raises(ValueError, match="`--card_gib 24`"):
        plan(24 / GIB)


# vLLM's share, planned


@pytest.mark.parametrize(
    "changes",
    [{}, {"vllm_enable_sleep_mode": True}, {"vllm_enable_sleep_mode": True, "vllm_sleep_keeps_weights": True}],
    ids=["awake", "sleeps", "keeps weights"],
)
@pytest.mark.parametrize("once", [False, True])
def test_vllm_gets_what_the_training_leaves(plan: Plan, changes: dict[str, Any], once: bool) -> None:
    """A hundredth of the card more would not fit."""
    settings = {**VLLM, **changes, "vllm_share_base_weights": once}
    planned = plan(4, vllm_gpu_memory_utilization="auto", **settings)
    assert planned.problems() == []
    assert plan(4, vllm_gpu_memory_utilization=planned.share, **settings).table() == planned.table()
    more = plan(4, vllm_gpu_memory_utilization=planned.share + 0.01, **settings)
    assert max(more.rollout, more.update) > more.card


def test_a_card_that_leaves_nothing_has_no_share(plan: Plan) -> None:
    planned = plan(1.6, vllm_gpu_memory_utilization="auto", **VLLM)
    assert planned.share == 0
    assert planned.problems()


def test_an_adapter_of_float16_is_in_float32(plan: Plan) -> None:
    """TRL puts that of a 4-bit model into bfloat16, which the gradient scaler does not take."""
    settings = {"load_in_4bit": True, "dtype": "float16"}
    half, full = plan(**settings), plan(**settings, fp16=True)
    for part in ("adapter", "gradients", "optimizer"):
        assert full.policy[part] == 2 * half.policy[part]
