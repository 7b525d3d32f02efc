"""Which models the transformers engine can drive: it agrees with a full forward, or it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.families import FAMILIES, Family
from tests.support.family_checks import adapter_gradients, quantized, sample_segments, with_adapter
from tests.support.models import make_model
from tests.support.rows import skip_if_refused, tiny_config
from tests.support.segments import EOS, GREEDY, PROMPTS, complete, full_logprobs, generated
from treepo_trl.engines import SamplingOptions
from treepo_trl.engines.transformers import TransformersEngine, why_no_slots


def tiny(architecture: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """Eager attention is the one that knows softcapping."""
    torch.manual_seed(0)
    config = tiny_config(architecture, **{"initializer_range": 0.3, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


# Beside the families of `docs/models.md`, which are below.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "llama, multi-query": {"num_key_value_heads": 1},
    "llama, multi-head": {"num_key_value_heads": 4},
}
# Attention of their own, ALiBi, softcapping, no attention at all: never wrong numbers without an error.
RIGHT_OR_REFUSED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bloom", "mpt", "mamba")},
    "gemma2": {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 0.1},
    "gptj": {"rotary_dim": 4},
    "falcon, ALiBi": {"alibi": True, "new_decoder_architecture": False},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def check_against_full_forward(model: PreTrainedModel) -> None:
    completions, logprobs = complete(TransformersEngine(model, [EOS], SamplingOptions()), PROMPTS, 3, 12)
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RIGHT_OR_REFUSED])
def test_log_probabilities_are_those_of_a_full_forward(name: str) -> None:
    model = tiny(name.split(",")[0], **{**ARCHITECTURES, **RIGHT_OR_REFUSED}[name])
    try:
        check_against_full_forward(model)
    except ValueError as error:
        if name in ARCHITECTURES or "use_vllm" not in str(error):
            raise


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("bloom", {}, "layers that do not go through transformers' common attention interface"),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}, "ALiBi biases"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_attention"),
        ("qwen3", {"use_bidirectional_attention": True}, "attention that looks ahead"),
    ],
)
def test_what_has_no_slots_is_refused_by_name(name: str, changes: dict[str, Any], what: str) -> None:
    model = tiny(name, **changes)
    assert why_no_slots(model) == what
    with pytest.raises(ValueError, match=rf"has {what}\. Take `engine_for_model`, or set `use_vllm=True`"):
        TransformersEngine(model, [EOS])


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_windows_are_those_of_a_full_forward(window: int) -> None:
    """Shorter and longer than segments of three tokens, and than prompts."""
    model = make_model(use_sliding_window=True, sliding_window=window, max_window_layers=1)
    check_against_full_forward(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_soft_cap_is_sampled_with_where_it_is_trained_with(attention: str) -> None:
    """SDPA of transformers leaves it out, so the engine does."""
    skip_if_refused(attention)
    model = tiny("gemma2", attention, attn_logit_softcapping=0.1)
    check_against_full_forward(model)


def test_unused_sliding_window_is_no_obstacle() -> None:
    model = make_model(use_sliding_window=False, sliding_window=8)
    assert complete(TransformersEngine(model, [EOS], GREEDY), PROMPTS, 5, 12)[0] == generated(model, PROMPTS, 12)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore")
def test_the_log_probabilities_of_a_family_are_those_of_a_plain_forward(family: Family) -> None:
    model = family.model()
    engine, difference = sample_segments(model)
    assert difference < 1e-4
    assert engine.num_prefilled_tokens < 0.2 * engine.num_prompt_tokens  # states are kept, whatever they are
    assert isinstance(engine, TransformersEngine) == (why_no_slots(model) is None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_four_bits_train_and_are_sampled_from(family: Family, tmp_path: Path) -> None:
    policy = with_adapter(family, quantized(family, tmp_path))
    gradients = adapter_gradients(policy)
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients.values())
    assert sample_segments(policy)[1] < 1e-3
