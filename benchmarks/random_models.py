"""Architectures with random weights, and checkpoints of them that transformers and vLLM load without a network."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.support.architectures import QWEN3_4B, QWEN25_1_5B, QWEN25_7B


MODELS: dict[str, PreTrainedConfig] = {
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
    "qwen2.5-1.5b": QWEN25_1_5B,
    "qwen2.5-7b": QWEN25_7B,
    "qwen3-4b": QWEN3_4B,
}


def random_checkpoint(name: str, folder: Path) -> str:
    """Write the architecture in bfloat16 with random weights and a tokenizer of one word per token, `w0` and so on."""
    config = MODELS[name]
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 0, 1, None
    config.max_position_embeddings = 32768
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(config.vocab_size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)
