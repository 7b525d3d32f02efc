"""Reward functions and models: weights, missing rewards, columns."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import make_reward_model, make_tokenizer
from tests.support.trainers import SpyTrainer, expected_advantages, length_reward, make_config, parity_reward, trained


def test_several_rewards_are_weighted(tmp_path: Path, tiny_model_dir: str) -> None:
    async def slow_parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return parity_reward(completion_ids)

    config = make_config(tmp_path, reward_weights=[0.5, 2.0], scale_rewards="none")
    trainer = trained(SpyTrainer, tiny_model_dir, config, reward_funcs=[slow_parity, length_reward])
    for generation in trainer.generations:
        assert generation["rewards"].shape == (8, 2)
        completions = [tree.completion_ids(leaf) for tree in generation["trees"] for leaf in tree.leaves]
        assert generation["rewards"][:, 0].tolist() == pytest.approx(parity_reward(completions))
        generation["rewards"] = generation["rewards"] * torch.tensor([0.5, 2.0])
        expected = expected_advantages(generation, "none")
        torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-4, rtol=1e-4)
    assert all(log["rewards/length_reward/mean"] > 0 for log in trainer.state.log_history if "loss" in log)


def test_reward_model(tmp_path: Path, tiny_model_dir: str) -> None:
    reward_model, tokenizer = make_reward_model(), make_tokenizer()
    arguments = {"reward_funcs": reward_model, "reward_processing_classes": tokenizer}
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=1), **arguments)
    (generation,) = trainer.generations
    rewards = generation["rewards"][:, 0]
    assert rewards.std() > 0
    expected = expected_advantages(generation, "group")
    torch.testing.assert_close(generation["output"]["advantages"], expected, atol=1e-4, rtol=1e-3)
    for i, tree in enumerate(generation["trees"]):
        for j, leaf in enumerate(tree.leaves):
            text = generation["inputs"][4 * i]["prompt"] + tokenizer.decode(
                tree.completion_ids(leaf), skip_special_tokens=True
            )
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                assert reward_model(ids).logits.item() == pytest.approx(rewards[4 * i + j].item(), abs=1e-4)


def test_missing_rewards_are_left_out(tmp_path: Path, tiny_model_dir: str) -> None:
    """The first leaf of each tree is scored by no function, the second by one of two."""

    def first(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if i % 4 < 2 else r for i, r in enumerate(parity_reward(completion_ids))]

    def second(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [float("nan") if i % 4 == 0 else 2 * r for i, r in enumerate(parity_reward(completion_ids))]

    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, log_trees=True), reward_funcs=[first, second])
    for generation in trainer.generations:
        assert torch.isnan(generation["rewards"]).sum() == 6
        advantages = generation["output"]["advantages"]
        torch.testing.assert_close(advantages, expected_advantages(generation, "group"), atol=1e-4, rtol=1e-3)
        assert (advantages[::4] == 0).all()
        assert advantages[1::4, 0].abs().min() > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    record = json.loads((tmp_path / "trees/trees_000000.jsonl").read_text().splitlines()[0])
    assert record["rewards"][0] is None
