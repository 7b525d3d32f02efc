"""Tiny models and tokenizers, built in code: no hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}"
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `<eos>` 0, `<pad>` 1, the roles, and w0 to w59."""
    words = ["<eos>", "<pad>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(**changes: object) -> Qwen3ForCausalLM:
    """A random two-layer Qwen3 with a vocabulary of 65."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 65,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # of 32 dimensions: the fewest that vLLM has on CPU
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.5,  # a spread-out distribution, so that completions differ
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes}))
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 1
    return model


def make_reward_model() -> Qwen3ForSequenceClassification:
    """A random model of the same size that gives a text a number."""
    torch.manual_seed(1)
    return Qwen3ForSequenceClassification(Qwen3Config(**{**make_model().config.to_dict(), "num_labels": 1}))


def save_random_smollm2(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A random model of two layers with the tokenizer and the template of SmolLM2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **settings, num_key_value_heads=1, head_dim=32))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
