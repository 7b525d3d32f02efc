"""Widths that a training learns from its batches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerState

from tests.support.models import make_model
from tests.support.trainers import build, labelled, make_config, reward_by_kind
from treepo_trl import SegmentTree, TreePOTrainer
from treepo_trl.batch.width_schedule import WidthSchedule
from treepo_trl.checkpoints import saved_values
from treepo_trl.sampling.resolved_variance import DepthStatistics


def two_levels(num_leaves: int) -> SegmentTree:
    """Half of the leaves end after the first segment."""
    tree = SegmentTree([0])
    for i in range(num_leaves):
        node = tree.add(None, [1, 2, 3], finish_reason="stop" if i % 2 else None)
        if i % 2 == 0:
            tree.add(node, [4], finish_reason="stop")
    return tree


def schedule(folder: Path, **changes: Any) -> WidthSchedule:
    return WidthSchedule(
        make_config(folder, max_completion_length=6, segment_length=3, branch_schedule="sqrt", **changes)
    )


def test_widths_are_those_of_the_lengths_that_were_seen(tmp_path: Path) -> None:
    state, widths = TrainerState(), schedule(tmp_path)
    assert widths.widths(state) is None
    rewards = [[1.0, 0.0, 0.0, math.nan]] * 2
    metrics = widths.learn(state, 3.5, [two_levels(4), two_levels(4)], rewards, Accelerator(cpu=True))
    # Three tokens of all paths, one of half of them; a path that lives has decoded 3 and 4 tokens. Half of the leaves
    # end at each depth, and there are W = 4 of them in the mean.
    first, second = widths.widths(state) or (0, 0)
    assert second / first == pytest.approx((4 / 3) ** 0.5)
    assert first / 2 + second / 2 == pytest.approx(4)
    assert (metrics["tree/width/0"], metrics["tree/width/1"]) == (first, second)
    # Siblings only at the prompt: rewards 1, 0, 0 have a sample variance of a third.
    assert metrics["tree/resolved_variance/0"] == pytest.approx(1 / 3)
    assert "tree/resolved_variance/1" not in metrics
    assert widths.expected_length(state) == 4


def test_what_was_seen_with_other_segments_is_forgotten(tmp_path: Path) -> None:
    state, widths = TrainerState(), schedule(tmp_path)
    widths.learn(state, 4, [two_levels(4)], [[0.0] * 4], Accelerator(cpu=True))
    assert schedule(tmp_path).widths(state) is not None
    other = WidthSchedule(make_config(tmp_path, max_completion_length=6, segment_length=2, branch_schedule="sqrt"))
    assert other.widths(state) is None


def test_trees_of_all_processes_count(tmp_path: Path) -> None:
    state, widths = TrainerState(), schedule(tmp_path)
    three: Any = SimpleNamespace(device="cpu", gather=lambda own: torch.cat([own] * 3))
    widths.learn(state, 4, [two_levels(4)], [[0.0] * 4], three)
    flat: Any = saved_values(state)["treepo_depths"]
    assert DepthStatistics.from_flat(flat, 2).num_trees == 3


def test_a_training_opens_the_widths_that_it_has_learned(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, max_steps=3, branch_schedule="sqrt", advantage_estimator="optimal_baseline", logging_steps=1
    )
    trainer = build(
        TreePOTrainer, make_model(), config, train_dataset=labelled("cvvcvcvv"), reward_funcs=reward_by_kind
    )
    asked: list[Any] = []
    sample = trainer.sampler.sample
    trainer.sampler.sample = lambda *args, **options: asked.append(options["widths"]) or sample(*args, **options)
    trainer.train()
    assert asked[0] is None
    for widths, log in zip(asked[1:], trainer.state.log_history, strict=False):
        assert widths == pytest.approx([log[f"tree/width/{depth}"] for depth in range(len(widths))])
