"""The logs of runs on a disk, and what `treepo-trl view --health` prints of them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tree_logs import logged_line, small_tree, write_run
from treepo_trl.apps.view.command import main
from treepo_trl.health import Examination, logs_of_run


QUICKSTART = json.loads((ROOT / "tests/data/quickstart_logs.json").read_text())
"""By seed: the metrics that the rules read, of each of 20 steps of `make quickstart`."""


@pytest.mark.parametrize("seed", QUICKSTART)
def test_nothing_is_told_of_the_quickstart(seed: str) -> None:
    examination = Examination()
    assert [str(finding) for log in QUICKSTART[seed] for finding in examination.add(log)] == []
    assert {rule.name for rule in examination.without_data()} == {"engine"}


def idle_log(step: int) -> dict[str, float]:
    return {"step": step, "learning_rate": 0.0, "reward": 0.5}


def write_state(folder: Path, steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": steps, "log_history": [idle_log(step) for step in range(1, steps + 1)]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def write_trees(folder: Path, steps: int) -> Path:
    """Trees whose leaves have one reward."""
    lines = {step: [logged_line(small_tree(), "Question", [0.0, 0.0, None], step)] for step in range(steps)}
    return write_run(folder, lines)


RUN_REWARDS: list[list[float | None]] = [[1.0, 0.0, 0.5], [0.0, 0.0, None]]


def test_a_step_of_the_tree_log_by_hand(tmp_path: Path) -> None:
    lines = [logged_line(small_tree(), "Question", rewards, 3) for rewards in RUN_REWARDS]
    run = logs_of_run(str(write_run(tmp_path, {3: lines})))
    assert run.sources == ["the tree log from step 4 to 4"]
    (log,) = run.logs
    # Leaves of 4, 3 and 4 tokens on 2 + 2 + 1 + 1 + 3 unique ones, in both trees; that of a fallback has no weight.
    expected = {
        "step": 4,
        "tree/mean_length": (4 + 3) / 2,
        "tree/finish_length_frac": 1 / 3,
        "tree/finish_repetition_frac": 0.0,
        "tree/leaf_unique_ratio": 11 / 9,
        "tree/prompts": 2,
        "tree/equal_rewards_frac": 0.5,
        # Around their means: rewards 0.5, -0.5, 0 and lengths 1/3, -2/3, 1/3; equal rewards and lengths 1/2, -1/2.
        "tree/length_reward_correlation": 0.5 / (0.5 * (6 / 9 + 0.5)) ** 0.5,
        "reward": 1.5 / 5,
        "reward_std": ((0.7**2 + 0.2**2 + 3 * 0.3**2) / 4) ** 0.5,
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected)


def test_the_tree_log_goes_on_where_the_last_checkpoint_ends(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-2", 2)
    write_state(tmp_path / "checkpoint-10", 3)
    run = logs_of_run(str(write_trees(tmp_path, 5)))
    assert run.sources == ["checkpoint-10/trainer_state.json up to step 3", "the tree log from step 4 to 5"]
    assert [log["step"] for log in run.logs] == [1, 2, 3, 4, 5]
    assert ["tree/leaf_unique_ratio" in log for log in run.logs] == [False] * 3 + [True] * 2
    write_state(tmp_path, 6)  # the end of the training
    assert logs_of_run(str(tmp_path)).sources == ["trainer_state.json up to step 6"]
    assert logs_of_run(str(tmp_path / "checkpoint-10")).sources == ["trainer_state.json up to step 3"]


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_state(Path("idle"), 6)
    write_trees(Path("hard"), 40)
    main(["idle", "hard", "--health"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "idle (trainer_state.json up to step 6): 1 finding."
    assert lines[1].startswith(
        "- step 5: the policy does not move: the learning rate was 0 in 5 logs one after the other"
    )
    assert lines[2].startswith("Not logged, so not examined: equal-rewards, cut, ")
    assert lines[3] == "hard (the tree log from step 1 to 40): 2 findings."
    assert lines[4].startswith("- step 5: completions are cut off: 33% of the completions")
    assert lines[5].startswith("- step 40: most prompts teach nothing")  # one a step
    assert [path.name for path in Path().iterdir() if path.is_file()] == []


CUT = '{"global_step": 4, "log_hist'
CHANGES: dict[str, Callable[[Path], object]] = {
    "without trees": lambda run: [file.unlink() for file in (run / "trees").iterdir()],
    "cut state": lambda run: (run / "trainer_state.json").write_text(CUT),
    "state without logs": lambda run: (run / "trainer_state.json").write_text(
        '{"global_step": 4, "log_history": [1]}'
    ),
    "cut trees": lambda run: (run / "trees/trees_000002.jsonl").write_text('{"step": 2, "pro'),
    "unchanged": lambda run: None,
}


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ("without trees", ["run"], r"`run` has no logs: neither a `trainer_state\.json`.*`log_trees: true` writes\."),
        ("cut state", ["run"], r"run/trainer_state\.json: it is no JSON from character"),
        ("state without logs", ["run"], r"run/trainer_state\.json: `log_history\[0\]` is 1; it must be an object"),
        ("cut trees", ["run"], r"run/trees/trees_000002\.jsonl, line 1: it is no JSON from character"),
        ("unchanged", ["gone"], r"`gone` is no folder"),
        ("unchanged", ["run", "--serve"], r"`--health` prints words and makes no page"),
        ("unchanged", ["run", "--out", "page.html"], r"`--health` prints words and makes no page"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    CHANGES[change](write_trees(Path("run"), 3))
    with pytest.raises(SystemExit) as error:
        main([*argv, "--health"])
    assert re.fullmatch(rf"treepo-trl: error: .*{message}.*", str(error.value.code)), error.value.code
