"""
What TRL promises about environments and rollouts, and what must hold here as it does there.

Of tools it is tests/turns/test_stock_loop.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.support.environments import Counter, Forking, fresh
from tests.support.tools import (
    TOOL_SETTINGS,
    ScriptedAgent,
    call,
    questions,
    talk_reward,
    tool_config,
    tool_trainer,
)
from tests.support.trainers import SETTINGS, logs_of
from treepo_trl import TreePOTrainer
from treepo_trl.engines import SegmentRequest


class ScriptedStock(GRPOTrainer):
    """GRPOTrainer whose model is a script."""

    agent: ScriptedAgent

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        self.agent.submit([SegmentRequest(i, ids, self.max_completion_length) for i, ids in enumerate(prompt_ids)])
        return [result.token_ids for result in self.agent.collect()], None


Maker = Callable[..., Any]


@pytest.fixture(params=["stock", "trees"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """Makes a trainer of either kind, whose turns come from a script."""

    def maker(first: list[str], later: list[str] | None = None, **changes: Any) -> Any:
        agent = ScriptedAgent(1, first, later or ["Done."])
        names = ("tools", "environment_factory", "rollout_func", "reward_funcs", "train_dataset")
        arguments = {name: changes.pop(name) for name in names if name in changes}
        settings = {"max_steps": 1, **changes}
        if request.param == "trees":
            return tool_trainer(TreePOTrainer, tool_config(tmp_path, **settings), agent, **arguments)
        config = GRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **TOOL_SETTINGS, **settings})
        trainer = tool_trainer(ScriptedStock, config, **arguments)
        trainer.agent = agent
        return trainer

    return maker


def keeping(seen: list[Any]) -> Callable[..., list[float]]:
    """A reward function that keeps what it is given."""

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.append({"completions": completions, **columns})
        return talk_reward(completions)

    return reward


def test_environments_reach_the_reward_in_order(make: Maker) -> None:
    seen: list[Any] = []

    def reward(environments: list[Any], start: list[int], completions: list[Any], **_: Any) -> list[float]:
        assert len(environments) == len(completions)
        seen.extend(zip(environments, start, completions, strict=True))
        return [float(each.value) for each in environments]

    turns = [call("step", n=n) for n in (1, 2)]
    trainer = make(turns, tools=None, environment_factory=fresh(Forking), reward_funcs=reward)
    trainer.train()
    for environment, start, completion in seen:
        asked = completion[0]["tool_calls"][0]["function"]["arguments"]["n"]
        assert completion[1]["content"] == f"It shows {start + asked}."
        assert isinstance(environment, Counter)
    assert logs_of(trainer, "reward")[0] > 0


@pytest.mark.parametrize("is_async", [False, True])
def test_an_environment_may_own_the_reward(make: Maker, is_async: bool) -> None:
    class Owning(Forking):
        pass

    if is_async:

        async def get_reward(self: Any) -> float:
            return float(self.value)

        Owning.get_reward = get_reward  # pyright: ignore[reportAttributeAccessIssue]
    trainer = make([call("step", n=1)], tools=None, environment_factory=fresh(Owning), reward_funcs=[])
    trainer.train()
    assert trainer.reward_func_names == ["Owning"]
    assert "rewards/Owning/mean" in trainer.state.log_history[0]


def test_the_observation_stands_behind_the_prompt(make: Maker) -> None:
    seen: list[Any] = []
    trainer = make(["It is 7."], tools=None, environment_factory=fresh(Forking), reward_funcs=keeping(seen))
    trainer.train()
    for prompt, start in zip(seen[0]["prompts"], seen[0]["start"], strict=True):
        assert prompt[-1]["content"].endswith(f"+ 4? The counter shows {start}.")
    assert all("shows" not in row["prompt"][-1]["content"] for row in questions())


def test_columns_of_a_rollout_reach_the_reward(make: Maker) -> None:
    seen: list[Any] = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(prompt[-1]["content"])["input_ids"] for prompt in prompts]
        completions = [[65 + i % 3, 66, trainer.processing_class.eos_token_id] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "mine": list(range(len(prompts)))}

    trainer = make([], tools=None, rollout_func=rollout, reward_funcs=keeping(seen))
    trainer.train()
    assert seen[0]["mine"] == list(range(len(seen[0]["completions"])))
    assert logs_of(trainer, "completions/mean_length") == [3.0]
