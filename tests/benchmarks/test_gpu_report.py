"""
The report of a GPU: what becomes of parts and visits, the page, and every stage at toy size.

No model library is imported above, since the processes of parts import this file.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu_report
from benchmarks.report import files
from benchmarks.report.cases import Case, Stage, alternating
from benchmarks.report.machine import commit, versions
from benchmarks.report.page import render
from benchmarks.report.processes import Outcome, Processes, _descendants
from benchmarks.report.stages import STAGES
from benchmarks.report.stages.trainings import architecture_of, recipe_gib
from tests.support.paths import ROOT
from treepo_trl.apps.doctor.findings import CannotRunError


def measures(record: Any, value: float) -> None:
    record("speed: m/s", value)


def fails(record: Any) -> None:
    record("speed: m/s", 1.0)
    raise RuntimeError("first line\nthe | last   line\n")


def dies(record: Any) -> None:
    record("speed: m/s", 1.0)
    sys.stderr.write("out of memory\n")
    os.kill(os.getpid(), 9)


def cannot(record: Any) -> None:
    raise CannotRunError("no card")


def hangs(record: Any) -> None:
    record("speed: m/s", 2.0)
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


@pytest.mark.parametrize(
    ("case", "limit", "outcome"),
    [
        (Case("a", measures, {"value": 3.0}), 60, {"rows": {"speed: m/s": [3.0]}}),
        (Case("a", measures, {"value": math.nan}), 60, {"rows": {"speed: m/s": ["nan"]}}),
        (Case("b", fails), 60, {"rows": {"speed: m/s": [1.0]}, "failed": "RuntimeError: the / last line"}),
        (
            Case("c", dies),
            60,
            {
                "rows": {"speed: m/s": [1.0]},
                "failed": "its process ended with status -9; its last line: out of memory",
            },
        ),
        (Case("d", cannot), 60, {"rows": {}, "cannot_run": "no card"}),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_every_part_has_an_end_and_keeps_what_it_has_measured(
    case: Case, limit: float, outcome: dict, tmp_path: Path
) -> None:
    found = Processes(tmp_path, smoke=False).run(case, "log", limit)
    assert found.pop("seconds") >= 0
    assert found == outcome


def test_a_part_ends_with_its_time(tmp_path: Path) -> None:
    """However far it has come: a process that has not begun yet ends too."""
    for limit in (0.0, 4.0):
        found = Processes(tmp_path, smoke=False).run(Case("e", hangs), "log", limit)
        assert found["failed"].startswith("not done after")
        assert found["timed_out"]


def serves(record: Any, dies_after: Path | None = None) -> None:
    record("server", str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))
    while dies_after is None or not dies_after.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), 9)


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone, or only a name; on a busy machine the signal takes its time."""
    for _ in range(1200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_what_a_part_has_started_ends_with_its_time(tmp_path: Path) -> None:
    """Servers and the processes of a launcher have sessions of their own."""
    for limit in (4.0, 20.0, 100.0):  # on a busy machine it may not come as far in a short time
        found = Processes(tmp_path, smoke=False).run(Case("f", serves), "log", limit)
        assert found["timed_out"]
        if found["rows"]:
            break
    (pid,) = map(int, found["rows"]["server"])
    assert ends(pid)


def test_what_a_part_has_started_ends_where_the_part_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for want of memory."""
    seen = tmp_path / "seen"

    def noting(pid: int) -> set[psutil.Process]:
        if found := _descendants(pid):
            seen.touch()
        return found

    monkeypatch.setattr("benchmarks.report.processes._descendants", noting)
    found = Processes(tmp_path, smoke=False).run(Case("g", serves, {"dies_after": seen}), "log", 100.0)
    assert "ended with status -9" in found["failed"]
    (pid,) = map(int, found["rows"]["server"])
    assert ends(pid)


class Scripted:
    """Stands in for [`Processes`]: says what becomes of each part, and which ran."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes, self.ran = outcomes, []

    def run(self, case: Case, log_name: str, limit: float) -> Outcome:
        self.ran.append(case.name)
        return {**self.outcomes[case.name]}


DONE: Outcome = {"rows": {"speed: m/s": [1.0, 3.0]}}
FAILED: Outcome = {"rows": {}, "failed": "no"}
LATE: Outcome = {"rows": {}, "failed": "not done", "timed_out": True}
STAGE = Stage("toy", "Toy", "About.", lambda smoke: [Case(name, measures) for name in "abc"])
FRESH = files.new_file("toy", False, {"card": "Card"}, {"torch": "2"}, "abc")


def visit(path: Path, processes: Any, retry: bool = False, **changes: Any) -> files.StageFile:
    """One call of the script, for this stage."""
    data = gpu_report.opened(path, {**json.loads(json.dumps(FRESH)), **changes}, retry)
    if not data["is_finished"]:
        gpu_report.run_stage(STAGE, path, data, processes, 60)
    return files.read(path)


def test_a_stage_goes_on_where_its_time_was_up_and_is_then_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    first = Scripted(a=DONE, b=LATE)
    assert not visit(path, first)["is_finished"]
    assert first.ran == ["a", "b"]
    second = Scripted(b=DONE, c=FAILED)
    data = visit(path, second)
    assert second.ran == ["b", "c"]
    assert data["is_finished"]
    assert data["medians"] == {"speed: m/s": 2.0}
    assert visit(path, Scripted()) == data


def test_a_part_that_had_the_whole_time_has_failed(tmp_path: Path) -> None:
    processes = Scripted(a=LATE, b=DONE, c=DONE)
    assert visit(tmp_path / "toy.json", processes)["cases"]["a"] == FAILED | {"failed": "not done"}
    assert processes.ran == ["a", "b", "c"]


def test_failed_parts_run_again_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    visit(path, Scripted(a=DONE, b=FAILED, c=DONE))
    again = Scripted(b=DONE)
    assert "failed" not in visit(path, again, retry=True)["cases"]["b"]
    assert again.ran == ["b"]


def test_figures_of_two_versions_are_never_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    visit(path, Scripted(a=DONE, b=LATE))
    newer = Scripted(a=DONE, b=DONE, c=DONE)
    assert visit(path, newer, commit="def")["commit"] == "def"
    assert newer.ran == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"commit": "def"}, "was measured at commit abc"),
        ({"versions": {"torch": "3"}}, "was measured with other versions"),
        ({"machine": {"card": "Card", "CUDA": "14"}}, "was measured on another machine"),
    ],
    ids=["commit", "versions", "machine"],
)
def test_a_finished_file_of_other_code_is_left_as_it_is(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its good parts cannot be measured again with that code."""
    path = tmp_path / "toy.json"
    data = visit(path, Scripted(a=DONE, b=FAILED, c=DONE))
    assert visit(path, Scripted(), retry=True, **changes) == data
    assert f"{said}; delete {path} to measure it anew" in capsys.readouterr().err


def test_ways_take_turns() -> None:
    assert alternating(["x", "y"], 2) == [("x", 0), ("y", 0), ("y", 1), ("x", 1)]


def write(folder: Path, card: str, cases: dict[str, Outcome], **changes: Any) -> None:
    data = files.new_file("toy", False, {"card": card}, {"torch": "2"}, "abc")
    data["cases"], data["is_finished"] = cases, True
    data.update(changes)  # type: ignore[typeddict-item]
    files.write(folder / card.lower() / "toy.json", data)


def test_the_page_has_a_column_for_each_card(tmp_path: Path) -> None:
    stage = Stage("toy", "Toy", "About.", lambda smoke: [], (("a / b", "a: s", "b: s"),))
    write(tmp_path, "B", {"all": {"rows": {"a: s": [1.0, 4.0, 2.0], "b: s": [0.5], "state": ["ok"]}}})
    write(tmp_path, "A", {"x": {"rows": {"a: s": [1500.0]}, "failed": "oom"}, "y": {"rows": {}, "cannot_run": "old"}})
    page = render(tmp_path, [stage])
    table = """\
|  | A | B |
|---|---|---|
| a: s | 1,500 | 2.00 (1.00 to 4.00) |
| part `x` | failed: oom | - |
| part `y` | cannot run: old | - |
| b: s | - | 0.50 |
| state | - | ok |
| a / b | - | 4.00 |
"""
    assert table in page
    assert "| A | toy | `abc` | torch 2 |" in page
    assert "Not measured yet" not in page
    assert "Not finished" not in page


def test_the_page_says_what_is_not_finished_and_what_is_a_toy(tmp_path: Path) -> None:
    write(tmp_path, "A", {"all": {"rows": {}}}, is_finished=False, smoke=True)
    page = render(tmp_path, [STAGE])
    assert "Not finished yet: A." in page
    assert "Toy sizes" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "it holds list"),
        ("{}", "`stage` is None"),
        (json.dumps(FRESH | {"machine": {}}), "names no card"),
        (json.dumps(FRESH | {"cases": {"a": {"rows": {"b": 1}}}}), "case 'a' has no rows"),
        (json.dumps(FRESH | {"medians": {"a: s": 1.0}}), "`medians` are not those"),
    ],
)
def test_what_is_no_file_of_a_stage_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        files.read(path)
    assert str(path) in str(error.value)


def test_the_script_names_a_broken_file_and_writes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card/kernels.json").write_text("{")
    page = tmp_path / "page.md"
    arguments = ["gpu_report", "--render", "--data", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"kernels\.json is no JSON .* Remove it"):
        gpu_report.main()
    assert not page.exists()


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    page = render(gpu_report.DATA, STAGES)
    assert gpu_report.PAGE.read_text() == page, "`python -m benchmarks.gpu_report --render`"
    assert ("**Not measured yet.** Run `make gpu-report`" in page) == (not list(gpu_report.DATA.glob("*/*.json")))


def test_no_committed_figure_is_a_toy() -> None:
    for path in gpu_report.DATA.glob("*/*.json"):
        assert not files.read(path)["smoke"]


def test_parts_have_names_of_their_own_and_checkpoints_that_can_be_written() -> None:
    from benchmarks.random_models import MODELS

    for stage in STAGES:
        for smoke in (False, True):
            cases = stage.cases(smoke)
            assert len({case.name for case in cases}) == len(cases) > 0
            assert {case.architecture for case in cases} <= {None, *MODELS}


def test_every_recipe_has_a_model_of_its_size() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.random_models import MODELS

    for path in (ROOT / "examples/cli_configs").glob("*.yaml"):
        assert architecture_of(path) in MODELS
        named = recipe_gib(path.stem)
        assert (named is None) == ("gb" not in path.stem and "t4" not in path.stem)
        assert named is None or path.stem.endswith(("-t4", f"-{named}gb"))
    with torch.device("meta"):
        half = AutoModelForCausalLM.from_config(MODELS["qwen2.5-0.5b"])
    assert half.num_parameters() == pytest.approx(0.49e9, rel=0.02)


ALL_STAGES = [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    "names", [["kernels", "rollout"], pytest.param(ALL_STAGES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_stages_run_at_toy_size(tmp_path: Path, names: list[str]) -> None:
    """In processes of its own: it starts vLLM."""
    stages = [stage for stage in STAGES if stage.name in names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--smoke", "--data", str(tmp_path), "--stages", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder,) = tmp_path.iterdir()
    for stage in stages:
        data = files.read(folder / f"{stage.name}.json")
        assert data["is_finished"]
        assert data["smoke"]
        assert list(data["cases"]) == [case.name for case in stage.cases(True)]
        assert {name: each["failed"] for name, each in data["cases"].items() if "failed" in each} == {}
        assert data["versions"] == versions()
        assert data["commit"] == commit()
        assert data["medians"] or all(
            "cannot_run" in each or stage.name == "doctor" for each in data["cases"].values()
        )
    page = render(tmp_path, stages)
    assert "Toy sizes" in page
    assert "failed:" not in page
    assert all(f"## {stage.title}\n" in page for stage in stages)
