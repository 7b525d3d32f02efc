"""Each illness by hand: a healthy training in which some metrics are changed, and what rewards say about prompts."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tree_logs import small_tree
from treepo_trl.health import RULES, Examination, Finding
from treepo_trl.health.reward_signal import signal_metrics, signal_sums


HEALTHY: dict[str, float] = {
    "loss": 0.01,
    "grad_norm": 0.2,
    "learning_rate": 1e-5,
    "reward": 0.5,
    "reward_std": 0.5,
    "rewards/first/mean": 0.5,
    "rewards/second/mean": 0.5,
    "tree/equal_rewards_frac": 0.4,
    "tree/prompts": 8.0,
    "tree/length_reward_correlation": -0.1,
    "tree/mean_length": 100.0,
    "tree/finish_length_frac": 0.1,
    "tree/finish_repetition_frac": 0.0,
    "tree/leaf_unique_ratio": 1.3,
    "engine/logp_difference_mean": 0.03,
}

Values = Sequence[float | None]


def findings_of(changes: dict[str, Values], without: Sequence[str] = ()) -> list[Finding]:
    """What is told of a healthy training of 20 logs or more, one per step, with these metrics in place of its own."""
    count = max([20, *map(len, changes.values())])
    examination = Examination()
    found = []
    for i in range(count):
        log: dict[str, Any] = {name: value for name, value in HEALTHY.items() if name not in without}
        for name, values in changes.items():
            if i < len(values):
                log[name] = values[i]
        found += examination.add({**log, "step": i + 1})
    return found


def equal(reward: float, prompts: float | None = 8.0, count: int = 20) -> dict[str, Values]:
    """Prompts all of whose completions have the same reward, in so many logs."""
    return {"tree/equal_rewards_frac": [1.0] * count, "tree/prompts": [prompts] * count, "reward": [reward] * count}


CASES: list[tuple[str, dict[str, Values], int, str]] = [
    # (4 * 0.85 + 1.0) / 5 = 0.88 in the window that ends at step 11, (3 * 0.85 + 2 * 1.0) / 5 = 0.91 in the next.
    (
        "equal-rewards",
        {"tree/equal_rewards_frac": [0.85] * 10 + [1.0] * 10, "reward": [0.0] * 20},
        12,
        "in 91% of the prompts all completions had the same reward, over 5 logs, at a mean reward of 0.",
    ),
    ("equal-rewards", equal(-1.0), 5, "at a mean reward of -1."),
    # 40 prompts are 20 logs of 2, and 40 of 1 or of a number that was not logged.
    ("equal-rewards", equal(1.0, 2.0), 20, "over 20 logs, at a mean reward of 1."),
    ("equal-rewards", equal(0.5, None, 40), 40, "over 40 logs, at a mean reward of 0.5."),
    ("unscored", {"reward": [0.5] * 10 + [None] * 10}, 12, "no reward function scored any completion"),
    ("unscored", {"reward": [math.nan] * 20}, 2, "no reward function scored any completion"),
    (
        "unscored",
        {"rewards/second/mean": [0.5] * 6 + [None] * 5},
        11,
        "second returned None for every completion of 5 logs",
    ),
    ("cut", {"tree/finish_length_frac": [0.1] * 10 + [0.6] * 2}, 12, "30% of the completions were cut"),
    ("repetition", {"tree/finish_repetition_frac": [0.0] * 10 + [1.0] * 1}, 11, "20% of the completions ended in a"),
    # Windows of 5: from 100 at the start to (100 + 4 * 200) / 5 = 180, with an error of (2000 / 5) ** 0.5 = 20.
    # A step before, 160 with an error of 24.5 is not yet 3 of them longer.
    (
        "length",
        {"tree/mean_length": [100.0] * 10 + [200.0] * 10},
        14,
        "rose from 100 to 180 tokens, and the reward went from 0.5 to 0.5.",
    ),
    (
        "length",
        {
            "tree/mean_length": [100.0] * 10 + [200.0] * 10,
            "tree/length_reward_correlation": [0.75] * 20,
            "reward": [0.2] * 10 + [0.9] * 10,
        },
        14,
        "the longer ones of a prompt get more reward (correlation 0.75).",
    ),
    ("no-sharing", {"tree/leaf_unique_ratio": [1.0] * 20}, 5, "a sampled token is in 1.00 completions on average"),
    ("engine", {"engine/logp_difference_mean": [0.03] * 5 + [0.18] * 2}, 7, "differ by 0.130 nats per token"),
    ("not-finite", {"grad_norm": [0.2] + [math.nan] * 24}, 21, "its norm is nan, and none was finite in 20 steps."),
    ("not-finite", {"grad_norm": [math.inf] * 25}, 20, "its norm is inf, and none was finite in 20 steps."),
    ("not-moving", {"grad_norm": [0.0] * 20}, 5, "the gradient was 0 in 5 logs one after the other"),
    ("not-moving", {"learning_rate": [0.0] * 20}, 5, "the learning rate was 0"),
]


@pytest.mark.parametrize(("name", "changes", "step", "seen"), CASES)
def test_an_illness_is_told_once_at_the_step_that_shows_it(
    name: str, changes: dict[str, Values], step: int, seen: str
) -> None:
    first, *more = findings_of(changes)
    assert (first.rule.name, first.step) == (name, step)
    assert seen in f"{first.seen}."
    assert str(first) == (
        f"step {step}: {first.rule.illness}: {first.seen}. Usual: {first.rule.usual}. Look at {first.rule.look_at}."
    )
    assert {finding.rule.name for finding in more} <= {name}


def test_every_rule_has_an_illness() -> None:
    assert {name for name, *_ in CASES} == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tree/equal_rewards_frac": [0.89] * 20, "reward": [0.0] * 20},
        {"tree/equal_rewards_frac": [0.0, 1.0] * 10, "tree/prompts": [1.0] * 20},
        {"reward": [0.5, None] * 10},
        {"rewards/second/mean": [0.5, None, None, None, None] * 4},  # functions of rare tasks
        {"tree/finish_length_frac": [0.29] * 20},
        {"completions/clipped_ratio": [1.0] * 20},  # a stop pattern is no end token, and no cut either
        {"tree/mean_length": [100.0] * 10 + [300.0] * 10, "reward": [0.2] * 10 + [0.9] * 10},
        {"tree/mean_length": [10.0, 100.0, 20.0, 90.0, 30.0, 100.0, 200.0] * 3},  # noise
        {"tree/leaf_unique_ratio": [1.11] * 20},
        {"sampling/sampling_logp_difference/mean": [0.7] * 20},  # the engine's own metric is there
        # The scale of fp16 is halved until it fits, 16 times from 65536 to 1, and later tried again.
        {"grad_norm": [math.inf] * 16 + [0.2] * 20 + [math.inf] + [0.2] * 5},
        {"learning_rate": [1e-5] * 16 + [0.0] * 4},
        {"grad_norm": [0.0] * 4 + [0.2]},
    ],
)
def test_what_is_no_illness(changes: dict[str, Values]) -> None:
    assert [str(finding) for finding in findings_of(changes)] == []


def test_other_names_of_the_same_metrics() -> None:
    """Of stock GRPOTrainer, and of a run without the check of the engine."""
    trees = [name for name in HEALTHY if name.startswith(("tree/", "engine/"))]
    changes: dict[str, Values] = {
        "frac_reward_zero_std": [1.0, 0.875] * 20,
        "completions/clipped_ratio": [0.5] * 20,
        "sampling/sampling_logp_difference/mean": [0.7] * 20,
        "completions/mean_length": [10.0] * 10 + [20.0] * 10,
    }
    found = [finding.rule.name for finding in findings_of(changes, trees)]
    assert found == ["engine", "cut", "length", "equal-rewards"]


def test_one_log_of_many_steps_may_be_an_overflow() -> None:
    examination = Examination()
    found = [examination.add({"grad_norm": math.inf, "step": step}) for step in (100, 200, 300)]
    assert list(map(len, found)) == [0, 0, 1]


def test_an_illness_that_comes_back_is_not_told_again() -> None:
    assert len(findings_of({"tree/leaf_unique_ratio": ([1.0] * 5 + [1.5] * 5) * 2})) == 1


def test_rules_without_data_are_named() -> None:
    examination = Examination()
    examination.add({"reward": 1.0, "rewards/first/mean": 1.0, "entropy": 0.5, "step": 1})
    assert {rule.name for rule in RULES} - {rule.name for rule in examination.without_data()} == {"unscored"}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([0, 0.0, -1.0, 1e-300, 1e308, -1e308, math.inf, -math.inf, math.nan, 10**400]),
    st.floats(),
)
NAMES = sorted({*HEALTHY, "frac_reward_zero_std", "step"})


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=12, max_size=16))
def test_no_log_is_an_error(logs: list[dict[str, Any]]) -> None:
    examination = Examination()
    for log in logs:
        for finding in examination.add(log):
            assert "\n" not in str(finding)


def test_sums_and_metrics_by_hand() -> None:
    # The leaves of the tree have 4, 3 and 4 tokens. Rewards 1, 0 and nothing: deviations of 0.5 and -0.5 in both.
    rewards = [[1.0, 0.0, math.nan], [0.5, 0.5005, 0.5], [None, None, 3.0]]
    sums = signal_sums([small_tree()] * 3, rewards)
    # The second prompt is equal up to a thousandth, and a single reward of the third is equal to itself.
    second = 2 * (0.0005 / 3) ** 2 + (0.0005 * 2 / 3) ** 2
    assert sums == pytest.approx([3, 2, 0.5 + (-2 / 3) * 0.0005, 0.5 + second, 0.5 + 2 / 3])
    assert signal_metrics([3, 2, 0.5, 0.5, 2.0]) == {
        "tree/prompts": 3,
        "tree/equal_rewards_frac": 2 / 3,
        "tree/length_reward_correlation": 0.5,
    }


def test_sums_of_processes_add_up() -> None:
    trees, rewards = [small_tree(), small_tree()], [[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]]
    parts = [signal_sums(trees[i : i + 1], rewards[i : i + 1]) for i in range(2)]
    assert signal_sums(trees, rewards) == pytest.approx([sum(pair) for pair in zip(*parts, strict=True)])


def test_no_correlation_without_differences() -> None:
    assert signal_metrics(signal_sums([small_tree()], [[1.0, 1.0, 1.0]])) == {
        "tree/prompts": 1,
        "tree/equal_rewards_frac": 1.0,
    }
