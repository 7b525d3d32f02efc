"""Which models the transformers engine can drive: it agrees with a full forward, or it refuses."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from tests.support.models import make_model
from tests.support.segments import EOS, GREEDY, PROMPTS, complete, full_logprobs, generated
from treepo_trl.engines import SamplingOptions
from treepo_trl.engines.transformers import TransformersEngine


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(config_class: type, **changes: Any) -> PreTrainedModel:
    common = {"vocab_size": 65, "eos_token_id": EOS, "pad_token_id": 1, "bos_token_id": None, "initializer_range": 0.3}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    config = config_class(**{**common, **(changes.pop("sizes", sizes)), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


MULTI_HEAD_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: tiny(LlamaConfig),
    "mistral": lambda: tiny(MistralConfig, sliding_window=None),
    "qwen3": lambda: tiny(Qwen3Config, head_dim=16),
    "gemma": lambda: tiny(GemmaConfig, head_dim=16),
    "phi3": lambda: tiny(Phi3Config),
    "gpt2": lambda: tiny(GPT2Config, sizes=GPT_SIZES),
    "gpt_neox": lambda: tiny(GPTNeoXConfig, sizes=MULTI_HEAD_SIZES),
    "multi_query": lambda: tiny(LlamaConfig, num_key_value_heads=1),
    "multi_head": lambda: tiny(LlamaConfig, num_key_value_heads=4),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_agree_with_a_full_forward(name: str) -> None:
    model = ARCHITECTURES[name]()
    engine = TransformersEngine(model, [EOS], SamplingOptions())
    completions, logprobs = complete(engine, PROMPTS, 3, 12)
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=True):
        expected = full_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


UNUSUAL: dict[str, Any] = {
    "gptj": lambda: tiny(GPTJConfig, sizes={**GPT_SIZES, "rotary_dim": 4}),
    "bloom": lambda: tiny(BloomConfig, sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": lambda: tiny(MptConfig, sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "falcon_alibi": lambda: tiny(FalconConfig, sizes=MULTI_HEAD_SIZES, alibi=True, new_decoder_architecture=False),
    "falcon": lambda: tiny(FalconConfig, sizes=MULTI_HEAD_SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "gemma2": lambda: tiny(Gemma2Config, head_dim=8),
    "mamba": lambda: tiny(MambaConfig, sizes={"hidden_size": 32, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_architectures_are_right_or_refused(name: str) -> None:
    """Attention of their own, ALiBi, softcapping, no attention at all: never wrong numbers without an error."""
    model = UNUSUAL[name]()
    try:
        engine = TransformersEngine(model, [EOS], SamplingOptions())
        completions, logprobs = complete(engine, PROMPTS[:4], 3, 9)
    except ValueError as error:
        if "use_vllm" not in str(error):
            raise
        return
    for prompt, completion, values in zip(PROMPTS, completions, logprobs, strict=False):
        expected = full_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


def test_sliding_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)full attention in every layer.*sliding.*use_vllm=True"):
        TransformersEngine(make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0), [EOS])
    with pytest.raises(ValueError, match=r"sliding window of 16 tokens"):
        TransformersEngine(tiny(MistralConfig, sliding_window=16), [EOS])


def test_unused_sliding_window_is_no_obstacle() -> None:
    model = make_model(use_sliding_window=False, sliding_window=8).eval()
    assert complete(TransformersEngine(model, [EOS], GREEDY), PROMPTS, 5, 12)[0] == generated(model, PROMPTS, 12)
