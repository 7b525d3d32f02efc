"""The line that a quickstart prints per step."""

from typing import Any

from treepo_trl.quickstart.progress import step_line


def test_step_line_says_what_sharing_saved() -> None:
    logs = {"reward": 0.25, "tree/decoded_tokens": 600.0, "tree/leaf_tokens": 1000.0, "tree/unique_tokens": 600.0}
    logs["step_time"] = 12.34
    assert step_line(logs, 7, 100) == (
        "step   7/100  reward 0.250  decoded 600 tokens  saved by sharing 400 (40%)  12.3 s"
    )


def test_step_line_without_trees_or_time() -> None:
    assert step_line({"reward": -1.0}, 10, 10) == "step 10/10  reward -1.000"


def test_step_line_when_more_was_decoded_than_is_in_leaves() -> None:
    # What a stop pattern cut off was decoded too; sharing still saved 100 - 80.
    logs = {"reward": 0.0, "tree/decoded_tokens": 110.0, "tree/leaf_tokens": 100.0, "tree/unique_tokens": 80.0}
    assert step_line(logs, 1, 1) == "step 1/1  reward 0.000  decoded 110 tokens  saved by sharing 20 (20%)"


def test_step_line_of_an_evaluation() -> None:
    assert step_line({"eval_reward": 0.5}, 7, 10) == "step  7/10  held-out reward 0.500"


def test_step_line_without_any_reward() -> None:
    logs: Any = {"reward": None, "step_time": 1.0}
    assert step_line(logs, 7, 10) == "step  7/10  reward none  1.0 s"
