"""Prompts: conversations, stop patterns, iterable datasets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from tests.support.models import make_tokenizer
from tests.support.trainers import (
    SpyTrainer,
    build,
    chat_prompts,
    expected_advantages,
    logs_of,
    make_config,
    parity_reward,
    plain_prompts,
)


def test_conversational_prompts(tmp_path: Path, tiny_model_dir: str) -> None:
    seen = []

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return parity_reward(completion_ids)

    trainer = build(
        SpyTrainer, tiny_model_dir, make_config(tmp_path), train_dataset=chat_prompts(), reward_funcs=reward
    )
    trainer.train()
    tokenizer = make_tokenizer()
    for prompt, completion in seen:
        assert prompt[0]["role"] == "user"
        assert completion[0]["role"] == "assistant"
        assert isinstance(completion[0]["content"], str)
    expected = tokenizer.apply_chat_template(seen[0][0], add_generation_prompt=True, return_dict=False)
    assert trainer.all_trees[0][0].prompt_ids == expected


def test_stop_pattern_ends_conversational_paths(tmp_path: Path, tiny_model_dir: str) -> None:
    pattern = r"w\d*5\b"
    config = make_config(tmp_path, stop_pattern=pattern, log_trees=True, max_steps=3)
    seen = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        seen.extend(completion[0]["content"] for completion in completions)
        return parity_reward(completion_ids)

    trainer = build(SpyTrainer, tiny_model_dir, config, train_dataset=chat_prompts(), reward_funcs=reward)
    trainer.train()
    tokenizer = make_tokenizer()
    ended = 0
    for tree in (tree for trees in trainer.all_trees for tree in trees):
        for leaf in tree.leaves:
            words = tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True).split()
            matches = [i for i, word in enumerate(words) if word.startswith("w") and word.endswith("5")]
            if tree.nodes[leaf].finish_reason == "pattern":
                ended += 1
                assert matches == [len(words) - 1], words
            else:
                assert not [i for i in matches if i < len(words) - 1], words
    assert ended > 3
    assert seen
    for log in trainer.state.log_history:
        if "loss" in log:
            assert log["tree/decoded_tokens"] >= log["tree/unique_tokens"]
    assert sum(logs_of(trainer, "tree/finish_pattern_frac")) > 0
    assert sum(logs_of(trainer, "tree/decoded_tokens")) > sum(logs_of(trainer, "tree/unique_tokens"))


@pytest.mark.parametrize("kind", ["map", "generator"])
def test_iterable_dataset(tmp_path: Path, tiny_model_dir: str, kind: str) -> None:
    if kind == "map":
        dataset = plain_prompts(4).to_iterable_dataset()
    else:
        dataset = IterableDataset.from_generator(lambda: ({"prompt": p} for p in plain_prompts(4)["prompt"]))
    trainer = build(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=3), train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 3
    for generation in trainer.generations:
        assert [g["prompt"] for g in generation["inputs"][:4]] == [generation["inputs"][0]["prompt"]] * 4
        assert len(generation["trees"]) == 2
        torch.testing.assert_close(
            generation["output"]["advantages"], expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3
        )
