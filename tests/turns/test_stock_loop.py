"""Leaf by leaf a tree holds what TRL's own loop over tools makes of the same turns."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.support.stock_loop import stock_rows
from tests.support.tools import FIRST, LATER, TOOL_SETTINGS, TOOLS, ScriptedAgent, call, tool_config, tool_trainer
from tests.support.trainers import (
    SETTINGS,
    RecordingTrainer,
    assert_same_logs,
    assert_same_parameters,
    change,
    logs_of,
    parameters_of,
)
from treepo_trl import TreePOTrainer


class GeneratedTrainer(RecordingTrainer):
    """Keeps what `_generate` gave for the last batch of the training."""

    generated: tuple[Any, ...]
    prompts: list[Any]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        self.prompts = copy.deepcopy(prompts)
        self.generated = super()._generate(prompts)
        return self.generated


def scripts(seed: int) -> tuple[list[str], list[str]]:
    """Turns drawn at random, calls with random arguments among them."""
    rng = random.Random(seed)
    some = [f"{'x' * rng.randint(0, 90)}{call('long_text', words=rng.randint(1, 90))}" for _ in range(3)]
    some += [call("add", a=rng.randint(0, 9), b=rng.randint(0, 9)) + call("boom") for _ in range(2)]
    return rng.sample(FIRST, 4) + some[:3], rng.sample(LATER, 3) + some[2:]


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_the_loop_of_trl(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    changes = {
        "max_completion_length": rng.choice([150, 300, 700]),
        "max_tool_calling_iterations": rng.choice([1, 2, None]),
        "max_steps": 1,
        "mask_truncated_completions": True,
    }
    trainer = tool_trainer(
        GeneratedTrainer, tool_config(tmp_path / "tree", **changes), ScriptedAgent(seed, *scripts(seed))
    )
    trainer.train()
    _, completion_ids, masks, completions, *_ = trainer.generated
    trees = trainer.all_trees[-1]

    stock_config = GRPOConfig(output_dir=str(tmp_path / "stock"), **{**SETTINGS, **TOOL_SETTINGS, **changes})
    stock = tool_trainer(GRPOTrainer, stock_config)
    expected = stock_rows(stock, trees, trainer.prompts, {tool.__name__: tool for tool in TOOLS})
    assert completion_ids == expected.completion_ids
    assert masks == expected.masks
    assert completions == expected.completions

    # TRL runs the calls of a turn that the cap has cut, and drops their answers; here they are not run.
    eos = trainer.processing_class.eos_token_id
    pairs = zip(completions, completion_ids, strict=True)
    num_cut = sum(len(row[-1].get("tool_calls") or []) for row, ids in pairs if ids[-1] != eos)
    num_calls = expected.num_calls - num_cut
    assert logs_of(trainer, "tools/call_frequency")[0] * len(completions) == pytest.approx(num_calls)
    if num_cut == 0:
        assert logs_of(trainer, "tools/failure_frequency")[0] * num_calls == pytest.approx(expected.num_failures)
    assert any(0 in mask for mask in masks)


class ReplayStock(GRPOTrainer):
    """Stock GRPOTrainer on the conversations that another trainer has sampled."""

    replayed: list[Any]

    def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
        torch.manual_seed(1)  # the shuffle that follows
        return copy.deepcopy(self.replayed[0])

    def _tool_call_loop(self, *_: Any) -> Any:
        return copy.deepcopy(self.replayed[1])


class ReplayedTrainer(TreePOTrainer):
    """Keeps what it gives TRL in place of a first turn, and of its loop over tools."""

    replayed: list[Any]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.replayed = [super()._generate_single_turn(*args, **kwargs)]
        torch.manual_seed(1)
        return copy.deepcopy(self.replayed[0])

    def _tool_call_loop(self, *args: Any) -> Any:
        self.replayed.append(super()._tool_call_loop(*args))
        return copy.deepcopy(self.replayed[1])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("loss_type", "changes"),
    [
        ("grpo", {"beta": 0.1}),
        pytest.param("dr_grpo", {"top_entropy_quantile": 0.5}, marks=SLOW),
        ("dapo", {"mask_truncated_completions": True, "max_completion_length": 250}),
        pytest.param("bnpo", {"scale_rewards": "batch"}, marks=SLOW),
        pytest.param("cispo", {"epsilon_high": 5.0}, marks=SLOW),
        pytest.param("sapo", {}, marks=SLOW),
        pytest.param("luspo", {"importance_sampling_level": "sequence"}, marks=SLOW),
        ("vespo", {"num_iterations": 2}),
    ],
)
def test_without_branching_equals_stock_grpo(
    tmp_path: Path, chat_model_dir: str, loss_type: str, changes: dict[str, Any]
) -> None:
    """Losses, entropies, clip ratios and importance ratios see sampled tokens alone, as in TRL."""
    shared = {**TOOL_SETTINGS, **changes, "loss_type": loss_type, "max_steps": changes.get("num_iterations", 1)}
    settings = {**shared, "branching_factor": 1, "tree_packing": "off"}
    ours = tool_trainer(
        ReplayedTrainer, tool_config(tmp_path / "tree", **settings), ScriptedAgent(3), model=chat_model_dir
    )
    ours.train()
    stock = tool_trainer(
        ReplayStock, GRPOConfig(output_dir=str(tmp_path / "stock"), **{**SETTINGS, **shared}), model=chat_model_dir
    )
    stock.replayed = ours.replayed
    stock.train()
    assert change(ours) > 1e-4
    assert_same_parameters(parameters_of(ours), parameters_of(stock), 1e-5)
    assert_same_logs(ours, stock, "tree/")
