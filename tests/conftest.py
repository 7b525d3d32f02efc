"""Tiny models and tokenizers, built in code: no hub."""

import os


# vLLM's engine core in this process, on a small cache; before anything imports it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


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


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model and its tokenizer, loadable by transformers and vLLM."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_model_dir() -> str:
    """Folder of SmolLM2-135M-Instruct; shared with the quickstart."""
    from treepo_trl.embedded import small_model

    return small_model(Path(__file__).parent.parent / ".cache/smollm2-135m-instruct")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    return make_model()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def decode_words() -> Callable[[list[int]], str]:
    """Text of token ids as `<id>` marks, so that texts are easy to write by hand."""
    return lambda ids: "".join(f"<{i}>" for i in ids)
