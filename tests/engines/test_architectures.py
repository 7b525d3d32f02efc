"""Which models the transformers engine can drive: it agrees with a full forward, or it refuses."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.models import make_model
from tests.support.rows import tiny_config
from tests.support.segments import EOS, GREEDY, PROMPTS, complete, full_logprobs, generated
from treepo_trl.engines import SamplingOptions
from treepo_trl.engines.transformers import TransformersEngine


def tiny(architecture: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(architecture, **{"initializer_range": 0.3, **changes})
    # Eager attention is the one that knows softcapping.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "phi3", "gpt2", "gpt_neox")},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
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


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RIGHT_OR_REFUSED])
def test_log_probabilities_are_those_of_a_full_forward(name: str) -> None:
    model = tiny(name.split(",")[0], **{**ARCHITECTURES, **RIGHT_OR_REFUSED}[name])
    try:
        completions, logprobs = complete(TransformersEngine(model, [EOS], SamplingOptions()), PROMPTS, 3, 12)
    except ValueError as error:
        if name in ARCHITECTURES or "use_vllm" not in str(error):
            raise
        return
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


def test_sliding_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)full attention in every layer.*sliding.*use_vllm=True"):
        TransformersEngine(make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0), [EOS])
    with pytest.raises(ValueError, match=r"sliding window of 16 tokens"):
        TransformersEngine(tiny("mistral", sliding_window=16), [EOS])


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 0.1}, "softcapped attention"),
    ],
)
def test_attention_of_another_kind_is_refused(name: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"full attention in every layer.*has {what}.*use_vllm=True"):
        TransformersEngine(tiny(name, **changes), [EOS])


def test_unused_sliding_window_is_no_obstacle() -> None:
    model = make_model(use_sliding_window=False, sliding_window=8)
    assert complete(TransformersEngine(model, [EOS], GREEDY), PROMPTS, 5, 12)[0] == generated(model, PROMPTS, 12)
