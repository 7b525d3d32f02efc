"""Trainings in environments: one reset per tree, and every path in a state of its own."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.support.environments import (
    GAME,
    GOES_ON,
    Counter,
    Forking,
    RandomForking,
    RandomReset,
    RandomStep,
    calls_of,
    fresh,
    game_trainer,
)
from tests.support.tools import WIDTH, ScriptedAgent, add, questions, with_agent
from tests.support.trainers import SpyTrainer, change, logs_of
from treepo_trl.turns import EnvironmentReplayError, RandomResetError


class PlayingTrainer(SpyTrainer):
    """
    Checks in each batch that every row's environment saw the calls of its row, and no others.

    Attributes:
        played: environments of the rows of each batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.played: list[list[Any]] = []

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        for environment, row, prompt, completion in zip(self.environments, inputs, prompts, completions, strict=True):
            assert environment.log == calls_of(completion)[: len(environment.log)]
            answered = sum(message["role"] == "tool" for message in completion)
            assert len(environment.log) in range(answered, answered + 3)  # an answer may not have fitted
            assert environment.value == row["start"] + sum(environment.log)
            assert f"The counter shows {row['start']}" in prompt[-1]["content"]
        self.played.append(list(self.environments))
        return super()._calculate_rewards(inputs, prompts, completions, ids)


@pytest.mark.parametrize(
    ("environment", "forking"),
    [(Forking, "auto"), (Counter, "deepcopy"), (Counter, "replay"), (Counter, "auto"), (RandomForking, "auto")],
)
def test_each_path_has_its_own_state(tmp_path: Path, environment: Any, forking: str) -> None:
    environment = fresh(environment)
    trainer = game_trainer(PlayingTrainer, tmp_path, environment, environment_forking=forking)
    trainer.train()
    assert change(trainer) > 0
    num_trees = sum(map(len, trainer.all_trees))
    trees = [tree for trees in trainer.all_trees for tree in trees]
    executed = sum(node.num_calls for tree in trees for node in tree.nodes)
    resets, forks, replayed = (
        [int(value) for value in logs_of(trainer, f"environment/{name}")]
        for name in ("resets", "forks", "replayed_calls")
    )
    # A metric is logged per step, and this training samples for each.
    assert sum(resets) == len(environment.resets)
    assert sum(logs_of(trainer, "tree/tool_calls")) == executed
    if forking in ("auto", "deepcopy") and environment.__name__ != "Counter":
        assert sum(resets) == num_trees
        assert replayed == [0, 0]
        calling = sum(node.num_calls > 0 for tree in trees for node in tree.nodes)
        assert sum(forks) == calling
    elif forking == "replay":
        assert forks == [0, 0]
        assert sum(replayed) > 0
    elif forking == "auto":
        assert all(len(tree.root_children) == WIDTH for tree in trees)
        assert num_trees < sum(resets) <= num_trees * WIDTH + 1  # one shows that resets repeat
        assert replayed == [0, 0]
    for tree, played in zip(trees, _by_tree(trainer.played), strict=True):
        states = [_state(tree, leaf) for leaf in tree.leaves]
        for i, state in enumerate(states):
            for j in range(i):
                assert (played[i] is played[j]) == (state == states[j])
    assert all(node.messages for tree in trees for node in tree.nodes if not node.is_sampled)


def _by_tree(played: list[list[Any]]) -> list[list[Any]]:
    rows = [environment for batch in played for environment in batch]
    return [rows[i : i + WIDTH] for i in range(0, len(rows), WIDTH)]


def _state(tree: Any, leaf: int) -> tuple[int, ...]:
    return tuple(node for node in tree.path(leaf) if tree.nodes[node].num_calls)


def test_a_public_environment_is_reset_and_used_again(tmp_path: Path) -> None:
    """What the factory made goes back after the rewards; copies are closed, and nothing else is."""
    environment = fresh(Forking)
    trainer = game_trainer(PlayingTrainer, tmp_path, environment, max_steps=3)
    trainer.train()
    pool = trainer._environment_pool[None]
    assert isinstance(pool, list)
    assert len(pool) == 2  # two trees at a time
    assert not any(each.is_closed for each in pool)
    assert all(each.is_closed for each in environment.made if each not in pool)
    assert trainer.environments is None
    assert not [thread for thread in threading.enumerate() if thread.name == "tool"]


@pytest.mark.parametrize("forking", ["auto", "replay"])
def test_a_random_reset_that_nothing_forks(tmp_path: Path, forking: str) -> None:
    trainer = game_trainer(PlayingTrainer, tmp_path, fresh(RandomReset), environment_forking=forking)
    with pytest.raises(RandomResetError, match=r"`reset` of RandomReset gave .*Put a seed into the example"):
        trainer.train()


def test_a_replay_that_does_not_repeat(tmp_path: Path) -> None:
    trainer = game_trainer(SpyTrainer, tmp_path, fresh(RandomStep), environment_forking="replay")
    with pytest.raises(
        EnvironmentReplayError, match=r"The call \{'name': 'step'.*answered 'It shows.*before it was 'It shows"
    ):
        trainer.train()


def test_auto_says_how_to_get_trees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        game_trainer(SpyTrainer, tmp_path, fresh(Counter))
        game_trainer(SpyTrainer, tmp_path, fresh(Forking))
    (message,) = [record.getMessage() for record in caplog.records if "_fork" in record.getMessage()]
    assert "Counter has no `_fork`: the paths of a tree share its prompt alone" in message


def test_several_kinds_of_environments(tmp_path: Path) -> None:
    class Loud(Counter):
        async def shout(self, n: int) -> str:
            """
            Adds to the counter, loudly.

            Args:
                n: How much.
            """
            return self.step(n).upper()

        async def get_reward(self) -> float:
            return float(len(self.log))

    names = ["quiet", "loud"] * 4
    data = questions().remove_columns("prompt").add_column("environment", names)
    kinds = {"quiet": fresh(Forking), "loud": fresh(Loud)}
    trainer = game_trainer(
        SpyTrainer, tmp_path, kinds, train_dataset=data, environment_forking="auto", max_steps=2, seed=5
    )
    with_agent(trainer, ScriptedAgent(5, GAME, GOES_ON))
    trainer.train()
    assert trainer.reward_func_names == ["Forking", "Loud"]
    assert len(kinds["quiet"].resets) + len(kinds["loud"].resets) > 4
    assert all("environment" not in kwargs for kind in kinds.values() for kwargs in kind.resets)
    for generation in trainer.generations:
        for i, row in enumerate(generation["inputs"]):
            quiet, loud = generation["rewards"][i].isnan().tolist()
            assert (quiet, loud) == (row["environment"] == "loud", row["environment"] == "quiet")
    shown = [trainer.processing_class.decode(tree.prompt_ids) for trees in trainer.all_trees for tree in trees]
    assert {"shout" in text for text in shown} == {True, False}


def test_without_a_dataset_environments_give_the_prompts(tmp_path: Path) -> None:
    class Riddle(Forking):
        def reset(self, **kwargs: Any) -> str:
            super().reset(len(type(self).resets) % 5)
            return f"Riddle {len(type(self).resets)}"

    environment = fresh(Riddle)
    trainer = game_trainer(SpyTrainer, tmp_path, environment, train_dataset=None, max_steps=2)
    trainer.train()
    prompts = [trainer.processing_class.decode(tree.prompt_ids) for trees in trainer.all_trees for tree in trees]
    assert ["Riddle" in text for text in prompts] == [True] * 4
    assert len(set(prompts)) == 4


def test_an_environment_without_tools(tmp_path: Path) -> None:
    """It only rewards: no turn is answered, and rows have real environments."""

    class Silent:
        def reset(self, start: int, **kwargs: Any) -> str:
            self.start = start
            return " Well?"

        def get_reward(self) -> float:
            return float(self.start)

    trainer = game_trainer(SpyTrainer, tmp_path, Silent, max_steps=1)
    trainer.train()
    (generation,) = trainer.generations
    assert generation["rewards"][:, 0].tolist() == [float(row["start"]) for row in generation["inputs"]]


def test_reward_functions_read_environments_beside_tools(tmp_path: Path) -> None:
    seen = []

    def reward(environments: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(environments)
        return [float(each.value) for each in environments]

    environment = fresh(Forking)
    trainer = game_trainer(SpyTrainer, tmp_path, environment, tools=[add], max_steps=1)
    trainer.reward_funcs[0] = reward
    trainer.train()
    assert {type(each) for each in seen} == {environment}
    assert logs_of(trainer, "tools/failure_frequency") == [0.0]


def test_a_lost_environment_has_no_reward(tmp_path: Path) -> None:
    hanging = threading.Event()

    class Hanging(Forking):
        def step(self, n: int) -> str:
            """
            Adds to the counter, or hangs.

            Args:
                n: How much.
            """
            if n == 3:
                hanging.wait(20)
            return super().step(n)

    trainer = game_trainer(SpyTrainer, tmp_path, fresh(Hanging), tool_timeout=0.1, max_steps=1, seed=4)
    try:
        trainer.train()
    finally:
        hanging.set()
    (generation,) = trainer.generations
    leaves = [tree.nodes[leaf].finish_reason for tree in generation["trees"] for leaf in tree.leaves]
    assert "timeout" in leaves
    kept = trainer._batch.rewards_per_func
    assert kept[:, 0].isnan().tolist() == [reason == "timeout" for reason in leaves]
    lost = [i for i, reason in enumerate(leaves) if reason == "timeout"]
    assert (generation["output"]["advantages"][lost] == 0).all()
    assert logs_of(trainer, "tree/finish_timeout_frac") == [len(lost) / len(leaves)]


@pytest.mark.parametrize("error", [RuntimeError("no reward"), KeyboardInterrupt()])
def test_after_an_error_the_trainer_can_go_on(tmp_path: Path, error: BaseException) -> None:
    environment = fresh(Forking)
    trainer = game_trainer(SpyTrainer, tmp_path, environment, max_steps=1)
    fails = [True]

    def get_reward(self: Any) -> float:
        if fails[0]:
            raise error
        return float(self.value)

    environment.get_reward = get_reward
    with pytest.raises(type(error)):
        trainer.train()
    used = [each for each in environment.made if hasattr(each, "value")]
    assert all(each.is_closed for each in used)
    assert isinstance(trainer._environment_pool[None], list)
    fails[0] = False
    trainer.train()
    assert trainer.state.global_step == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "tool"]


# Dynamic sampling


@pytest.mark.parametrize("forking", ["auto", "replay"])
def test_dynamic_sampling_resets_each_prompt_once(tmp_path: Path, forking: str) -> None:
    """Prompts of one reward are replaced, with their environments; what is kept is not reset again."""
    environment = fresh(Forking if forking == "auto" else Counter)
    data = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{i}."}] for i in range(12)], "start": range(12)}
    )

    def reward(environments: list[Any], start: list[int], **_: Any) -> list[float]:
        return [0.0 if first % 2 else float(len(each.log)) for each, first in zip(environments, start, strict=True)]

    trainer = game_trainer(
        PlayingTrainer,
        tmp_path,
        environment,
        train_dataset=data,
        dynamic_sampling_rounds=3,
        environment_forking=forking,
        max_steps=2,
    )
    trainer.reward_funcs[0] = reward
    trainer.train()
    num_sampled = sum(map(len, trainer.all_trees))
    assert sum(logs_of(trainer, "dynamic_sampling/replaced_prompts")) == num_sampled - 4 > 0
    if forking == "auto":
        assert len(environment.resets) == num_sampled
        assert len(trainer._environment_pool[None]) == 2
    for generation in trainer.generations:
        prompts = [trainer.processing_class.decode(ids) for ids in generation["output"]["prompt_ids"]]
        assert all("The counter shows" in text for text in prompts)
        assert len(generation["trees"]) <= 2
    assert change(trainer) > 0
