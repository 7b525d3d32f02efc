"""An environment of OpenEnv on a server of this computer: sessions that replay what led to them."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.tools import ScriptedAgent, call, tool_config, tool_trainer
from tests.support.trainers import SpyTrainer, change, logs_of
from treepo_trl import SegmentTree


pytest.importorskip("openenv", reason="`pip install openenv-core`")

FIRST = [*(f"First. {call('guess', number=n)}" for n in (2, 4, 11)), "I pass."]
LATER = [*(f"Then. {call('guess', number=n)}" for n in (0, 1, 3)), "That is it."]


def test_paths_replay_their_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaf is rewarded for the guesses of its own path, though all sessions are on one server."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/scripts"))
    example = runpy.run_path(str(ROOT / "examples/scripts/openenv_game.py"))
    with example["served"](64) as address, example["sessions"](address) as game:
        trainer = tool_trainer(
            SpyTrainer,
            tool_config(tmp_path, max_completion_length=500, environment_forking="replay"),
            ScriptedAgent(3, FIRST, LATER),
            train_dataset=example["games"](8, 0),
            tools=None,
            environment_factory=game,
            reward_funcs=[],
        )
        trainer.train()
    assert change(trainer) > 0
    assert sum(logs_of(trainer, "environment/replayed_calls")) > 0
    assert logs_of(trainer, "environment/forks") == [0, 0]
    for generation in trainer.generations:
        leaves = [(tree, leaf) for tree in generation["trees"] for leaf in tree.leaves]
        numbers = [row["number"] for row in generation["inputs"]]
        expected = [reward(_guesses(*at), number) for at, number in zip(leaves, numbers, strict=True)]
        assert len(set(expected)) > 3
        assert generation["rewards"][:, 0].tolist() == pytest.approx(expected)


def _guesses(tree: SegmentTree, leaf: int) -> list[int]:
    """What the calls of a path that ran have asked."""
    called: list[dict[str, Any]] = []
    for node in map(tree.nodes.__getitem__, tree.path(leaf)):
        if node.num_calls:
            called += node.messages[0]["tool_calls"]
    return [each["function"]["arguments"]["number"] for each in called]


def reward(guesses: list[int], number: int) -> float:
    """1 less a tenth per guess if the last one was right; else half of how near the best one was."""
    if not guesses:
        return 0.0
    if guesses[-1] == number:
        return 1 - 0.1 * len(guesses)
    return 0.5 * (1 - min(abs(guess - number) for guess in guesses) / 15)
