"""The line that a quickstart prints per step, and what stands above its bar."""

import logging
import sys
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from treepo_trl.quickstart.model import without_loading_bars
from treepo_trl.quickstart.progress import lines_above_the_bar, step_line


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


def test_what_is_logged_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a terminal a bar is rewritten from the start of its line; a text in between would stay beside it."""
    terminal = StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(logging.root, "handlers", [])
    package = logging.getLogger("a_package_with_a_handler")
    own = logging.StreamHandler(terminal)
    own.setLevel(logging.ERROR)
    to_file = logging.getLogger("a_package_with_a_file")
    to_nowhere = logging.getLogger("a_package_with_a_null_handler")
    for logger, handler in (
        (package, own),
        (to_file, logging.FileHandler(tmp_path / "log")),
        (to_nowhere, logging.NullHandler()),
    ):
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "propagate", logger is to_nowhere)
    with lines_above_the_bar(), tqdm(total=3, file=terminal) as bar:
        bar.update()
        logging.getLogger("another").warning("message 1")
        package.error("message 2")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("message 3", stacklevel=1)
        to_nowhere.warning("message 4")
        package.warning("below the level of its handler")
        to_file.warning("to a file")
        logging.getLogger("another").info("below the level of the last resort")
    shown = terminal.getvalue()
    # A warning also shows the path of its file, which may have any of the shorter words.
    for word in ("message 1", "message 2", "message 3", "message 4"):
        before = shown[: shown.index(word)].rpartition("\n")[2].rpartition("\r")[2]
        assert "|" not in before, "a bar stands in its line"
        assert shown.count(word) == (2 if word == "message 3" else 1), "a warning is shown with its line of code"
    assert "below" not in shown
    assert "to a file" not in shown
    assert package.handlers == [own]
    assert logging.root.handlers == []


@pytest.mark.parametrize("was_captured", [False, True])
def test_warnings_that_were_captured_stay_so(was_captured: bool) -> None:
    logging.captureWarnings(was_captured)
    try:
        before = warnings.showwarning
        with lines_above_the_bar():
            pass
        assert warnings.showwarning is before
    finally:
        logging.captureWarnings(False)


def test_loading_bars_are_left_out_and_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils.logging import is_progress_bar_enabled

    before = is_progress_bar_enabled()
    with without_loading_bars():
        assert not is_progress_bar_enabled()
        sys.stderr.write("what else is said\n")
    assert is_progress_bar_enabled() == before
    assert capsys.readouterr() == ("", "what else is said\n")
