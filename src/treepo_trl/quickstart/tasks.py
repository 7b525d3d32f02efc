"""Additions from `reasoning-gym`, to be worked out step by step, and the reward for their answers."""

import re
from collections.abc import Iterable, Sequence

from datasets import Dataset


NUM_HELD_OUT = 64
"""Tasks that are kept for evaluation, by every command and script alike: what one evaluates, no other trains on."""
_EXAMPLE = "3 + 4 + 5", "3 + 4 = 7, 7 + 5 = 12"


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

    Raises:
        ValueError: if there are not so many tasks that differ.
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
    held_out: dict[str, str] = {}
    train: list[tuple[str, str]] = []
    for entry in entries:
        question, answer = entry["metadata"]["expression"].strip(), str(entry["answer"])
        if len(held_out) < num_held_out:
            held_out[question] = answer
        elif question not in held_out and len(train) < num_train:
            train.append((question, answer))
    if len(train) < num_train or len(held_out) < num_held_out:
        raise ValueError(f"Got {len(train)} training and {len(held_out)} held-out tasks; ask for fewer held-out ones.")
    return _dataset(train), _dataset(held_out.items())


def _dataset(tasks: Iterable[tuple[str, str]]) -> Dataset:
    return Dataset.from_list([{"prompt": _conversation(question), "answer": answer} for question, answer in tasks])


def _conversation(question: str) -> list[dict[str, str]]:
    example, worked = _EXAMPLE
    return [
        {"role": "system", "content": "Add step by step."},
        {"role": "user", "content": example},
        {"role": "assistant", "content": worked},
        {"role": "user", "content": question},
    ]


def last_number(text: str) -> str:
    """The last whole number of a text, or an empty string."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def answer_reward(
    completions: Sequence[str | list[dict[str, str]]], answer: Sequence[str], **_: object
) -> list[float]:
    """1 for each completion, a text or a conversation, whose last number is the answer, else 0."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(last_number(text) == expected) for text, expected in zip(texts, answer, strict=True)]
