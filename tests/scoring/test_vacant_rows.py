"""Trees with fewer leaves than rows: what is vacant costs nothing and counts nowhere."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from tests.support.models import make_tokenizer
from tests.support.trainers import RecordingTrainer, build, logs_of, make_config, tables_of, trained, watch_loss
from treepo_trl import SegmentTree
from treepo_trl.batch.tree_batch import TreeBatch
from treepo_trl.scoring.outcome import ROWS_PER_LEAF
from treepo_trl.scoring.vacant_rows import LeafRows
from treepo_trl.settings.grpo import CHOICES
from treepo_trl.update.filled_rows import forward_filled
from treepo_trl.update.row_advantages import row_advantages


EOS = make_tokenizer().eos_token_id
WIDTH = 4  # rows of a tree


def tree_of(prompt: list[int], num_leaves: int) -> SegmentTree:
    """Leaves of different lengths below one segment, all but the last ended by EOS."""
    tree = SegmentTree(list(prompt))
    stem = tree.add(None, [5, 6], [-0.5, -0.6])
    for i in range(num_leaves):
        is_last = i == num_leaves - 1
        ids = [7 + i] * (i + 2) + ([] if is_last else [EOS])
        tree.add(stem, ids, [-0.1 * (j + 1) for j in range(len(ids))], "length" if is_last else "stop")
    return tree


def rollout(*sizes: int) -> Any:
    """A `rollout_func` whose trees have so many leaves, one after the other."""

    def sampled(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts[::WIDTH]]
        trees = [tree_of(prompt, size) for prompt, size in zip(ids, sizes, strict=True)]
        return {"trees": trees, "length": [tree.nodes[leaf].end for tree in trees for leaf in tree.leaves]}

    return sampled


def rewards_of(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 / 7 + 0.1 * len(ids) for ids in completion_ids]


# A batch


def test_rows_of_a_batch() -> None:
    batch = TreeBatch(0, WIDTH, EOS, trees=[tree_of([1], 4), tree_of([2], 2)])
    assert batch.is_vacant == [False] * 6 + [True] * 2
    assert batch.completion_ids()[4:] == [[5, 6, 7, 7, EOS], [5, 6, 8, 8, 8], [EOS], [EOS]]
    assert batch.logprobs()[6:] == [[0.0], [0.0]]
    assert batch.by_tree(list(range(8))) == [[0, 1, 2, 3], [4, 5]]
    assert batch.next(1).width == WIDTH


def test_vacant_rows_change_no_advantage() -> None:
    """Each leaf has what it has in its tree alone; the weights of a batch average to 1 over its leaves."""
    trees = [tree_of([1], 4), tree_of([2], 2), tree_of([3], 1)]
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0, 0.0, torch.nan, torch.nan, 1.0, *[torch.nan] * 3])
    for estimator in ("optimal_baseline", "leave_one_out", "treepo", "grpo"):
        weights = estimator in ("optimal_baseline", "leave_one_out")
        together = row_advantages(trees, rewards, torch.ones(12), 9, estimator, weights, leaves_per_tree=7 / 3)
        for i, tree in enumerate(trees):
            size = len(tree.leaves)
            own = rewards[4 * i :][:size]
            alone = row_advantages([tree], own, torch.ones(size), 9, estimator, weights)
            torch.testing.assert_close(together[4 * i :][:size], alone * (7 / 3 / size if weights else 1.0))
            assert not together[4 * i :][size:4].any()
        assert not together[8].any()  # a leaf without others has no baseline


# Reward functions


def test_reward_functions_are_called_for_leaves_alone() -> None:
    rows = LeafRows([False, True, False])
    seen: list[Any] = []

    def log_extra(column: str, values: list[Any]) -> None:
        seen.append((column, values))

    def function(prompts: list[str], answer: list[int], trainer_state: object, log_extra: Any) -> list[float]:
        log_extra("half", [each / 2 for each in answer])
        return [float(each) for each in answer]

    async def function_async(**columns: Any) -> list[float]:
        return function(**columns)

    columns = {"prompts": ["a", "b", "c"], "answer": [2, 4, 6], "trainer_state": None, "log_extra": log_extra}
    assert rows.scored_by(function)(**columns) == [2.0, 0.0, 6.0]
    assert asyncio.run(rows.scored_by(function_async)(**columns)) == [2.0, 0.0, 6.0]
    assert seen == [("half", [1.0, None, 3.0])] * 2
    assert LeafRows([False]).scored_by(function) is function


def test_a_reward_model_reads_leaves_alone() -> None:
    seen: list[int] = []

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            seen.append(len(input_ids))
            return SimpleNamespace(logits=input_ids.float().sum(1, keepdim=True))

    scored = LeafRows([False, True, False]).scored_by(Model())
    logits = scored(input_ids=torch.tensor([[1, 2], [3, 4], [5, 6]])).logits
    assert (logits.tolist(), seen) == ([[3.0], [0.0], [11.0]], [2])


# The forward pass


@pytest.mark.parametrize("batch_size", [None, 2])
def test_masked_rows_are_not_forwarded(batch_size: int | None) -> None:
    """As many forward passes as chunks: one for a chunk without a filled row, whose values are 0 all the same."""
    seen: list[list[int]] = []

    def forward(ids: torch.Tensor, mask: torch.Tensor, size: int | None) -> tuple[torch.Tensor, None, torch.Tensor]:
        seen.append(ids[:, 0].tolist())
        return 2.0 * ids, None, ids.float().mean()

    ids = torch.arange(6)[:, None].requires_grad_(False).float()
    filled = torch.tensor([True, False, False, False, True, True])
    values, entropies, _ = forward_filled(forward, filled, ids, torch.ones_like(ids), batch_size)
    assert values.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 8.0, 10.0]
    assert entropies is None
    assert seen == ([[0.0, 4.0, 5.0]] if batch_size is None else [[0.0], [2.0], [4.0, 5.0]])


# A training


@pytest.mark.parametrize("tree_packing", ["off", "sdpa"])
@pytest.mark.parametrize("level", CHOICES["importance_sampling_level"])
@pytest.mark.parametrize("loss_type", CHOICES["loss_type"])
def test_the_loss_is_that_of_the_leaves(
    tmp_path: Path, tiny_model_dir: str, loss_type: str, level: str, tree_packing: str
) -> None:
    """TRL's own loss and gradient on a micro-batch that never had the vacant rows, KL term included."""
    seen: list[dict[str, Any]] = []
    config = make_config(
        tmp_path,
        loss_type=loss_type,
        importance_sampling_level=level,
        tree_packing=tree_packing,
        beta=0.3,
        max_steps=1,
        num_iterations=2,
    )
    trainer = trained(
        RecordingTrainer, tiny_model_dir, config, reward_funcs=rewards_of, rollout_func=rollout(4, 2),
    )  # fmt: skip
    trainer.model.train()
    watch_loss(trainer, lambda model, inputs: seen.append(inputs))
    rows = trainer._buffered_inputs[0]
    assert float(rows.get(ROWS_PER_LEAF, 1.0)) == pytest.approx(8 / 6 if config.averages_rows else 1.0)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        trainer.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    loss = trainer.compute_loss(trainer.model, rows)
    found = gradient(loss)
    is_leaf = rows["completion_mask"].any(1)
    assert int(is_leaf.sum()) == 6
    leaves = {key: value[is_leaf] if value.ndim else value for key, value in rows.items()}
    leaves["advantages"] = leaves["advantages"] / rows.get(ROWS_PER_LEAF, 1.0)
    expected = GRPOTrainer._compute_loss(trainer, trainer.model, leaves)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradient(expected), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    assert found.abs().max() > 1e-4


def test_no_log_counts_a_vacant_row(tmp_path: Path, tiny_model_dir: str) -> None:
    """Lengths, rewards and the table of completions are those of six leaves; each reward is asked for once."""
    asked: list[int] = []

    def counted(completion_ids: list[list[int]], length: list[int], log_extra: Any, **columns: Any) -> list[float]:
        asked.append(len(completion_ids))
        assert length == [len(ids) for ids in completion_ids]
        log_extra("tokens", length)
        return rewards_of(completion_ids)

    config = make_config(tmp_path, max_steps=1, log_completions=True, log_trees=True)
    trainer = trained(RecordingTrainer, tiny_model_dir, config, reward_funcs=counted, rollout_func=rollout(4, 2))
    trees = [tree_of([1], 4), tree_of([2], 2)]
    ids = [tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves]
    lengths, rewards = [len(each) for each in ids], rewards_of(ids)
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    assert asked == [6]
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 6)
    assert (log["completions/min_length"], log["completions/max_length"]) == (min(lengths), max(lengths))
    assert log["completions/clipped_ratio"] == pytest.approx(2 / 6)
    ended = [length for length, each in zip(lengths, ids, strict=True) if each[-1] == EOS]
    assert log["completions/mean_terminated_length"] == pytest.approx(sum(ended) / 4)
    assert log["completions/min_terminated_length"] == min(ended)
    assert log["reward"] == pytest.approx(sum(rewards) / 6, rel=1e-5)
    assert log["tree/leaves_mean"] == 3
    assert log["tree/single_leaf_frac"] == 0
    prompts = [len(tree.prompt_ids) * len(tree.leaves) for tree in trainer._batch.trees]
    assert log["num_tokens"] == sum(prompts) + sum(lengths)
    (table,) = tables_of(tmp_path)
    assert len(table) == 6
    assert table["tokens"].tolist() == lengths
    assert table["counted"].tolist() == pytest.approx(rewards, rel=1e-5)


@pytest.mark.parametrize("sizes", [(4, 1), (1, 1), (2, 3)])
def test_trees_of_few_leaves_train(tmp_path: Path, tiny_model_dir: str, sizes: tuple[int, int]) -> None:
    """A tree of one leaf has no baseline and no gradient; nothing becomes a number that is none."""
    trainer = trained(
        RecordingTrainer,
        tiny_model_dir,
        make_config(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        reward_funcs=rewards_of,
        rollout_func=rollout(*sizes),
    )
    norms = logs_of(trainer, "grad_norm")
    assert all((norm > 0) == (sizes != (1, 1)) for norm in norms)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert logs_of(trainer, "tree/single_leaf_frac") == [sizes.count(1) / 2] * 2


def test_a_tree_of_a_rollout_must_have_its_leaves_where_a_fallback_fills_them(
    tmp_path: Path, tiny_model_dir: str
) -> None:
    given = {"reward_funcs": rewards_of, "rollout_func": rollout(4, 2)}
    with pytest.raises(ValueError, match=r"trees of 4, 2 leaves\. Return 2 trees, .* with 4 leaves each"):
        trained(RecordingTrainer, tiny_model_dir, make_config(tmp_path, fallback_policy="root"), **given)
    trainer = build(RecordingTrainer, tiny_model_dir, make_config(tmp_path), **given | {"rollout_func": rollout(4, 0)})
    with pytest.raises(ValueError, match=r"trees of 4, 0 leaves\. Return 2 trees, .* with 1 to 4 leaves each"):
        trainer.train()
