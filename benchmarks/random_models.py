"""Architectures with random weights, and checkpoints of them that transformers and vLLM load without a network."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.support.architectures import QWEN3_4B, QWEN25_1_5B, QWEN25_7B


MODELS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=49152,  # that of the small model's tokenizer
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 dimensions: the fewest that vLLM has on a processor
        num_key_value_heads=1,
    ),
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": QWEN25_1_5B,
    "qwen2.5-7b": QWEN25_7B,
    "qwen3-4b": QWEN3_4B,
}


def random_checkpoint(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """
    Write the architecture in bfloat16 with random weights, and a tokenizer.

    Without a tokenizer it is one of a word per token, `w0` and so on.
    """
    config = MODELS[name]
    tokenizer = tokenizer or word_tokenizer(config.vocab_size)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        None,
    )
    config.max_position_embeddings = 32768
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token for each of `<eos>`, `<pad>`, `<unk>`, `w0`, `w1` and so on."""
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(vocab_size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
