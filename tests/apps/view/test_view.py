"""`treepo-trl view`: what it finds, writes and refuses."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_tokenizer
from tests.support.paths import ROOT
from tests.support.tree_logs import logged_line, sampled_line, small_tree, write_lines, write_run
from treepo_trl.apps.view import find_sources
from treepo_trl.apps.view.command import load_decoders, main


def line(step: int = 0) -> dict[str, Any]:
    return logged_line(small_tree(), "Question", [1.0, 0.0, 0.0], step)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps in the working folder, without a tokenizer."""
    monkeypatch.chdir(tmp_path)
    return write_run(Path("run"), {0: [line()], 12: [line(12), line(12)]})


def test_a_page_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "--out", "new/page.html"])
    page = Path("new/page.html").read_text()
    assert re.findall(r'id="(tree-\d+)"', page) == ["tree-0", "tree-1", "tree-2"]
    assert "{{" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL), "a part of the page is missing"
    output = capsys.readouterr()
    assert output.out.startswith("3 trees in new/page.html (0.0 MiB)")
    assert "run has no tokenizer" in output.err
    assert [path.name for path in Path("new").iterdir()] == ["page.html"]


def test_options_come_from_a_config_file_too(run: Path) -> None:
    Path("view.yaml").write_text("runs: [run]\nout: from-config.html\n")
    main(["--config", "view.yaml"])
    assert Path("from-config.html").exists()


def test_what_names_stand_for(run: Path, tmp_path: Path) -> None:
    files = [str(file) for file in sorted((run / "trees").iterdir())]
    write_lines(Path("base.jsonl"), [sampled_line(small_tree(), "Question", ["a", "b", "c"])])
    write_lines(Path("adapter.jsonl"), [sampled_line(small_tree(), "Question", ["a", "b", "c"])])
    for names, expected in [
        (["run"], [("run", files)]),
        (["run/trees"], [("run/trees", files)]),
        (files, [("run/trees", files)]),
        (files[1:], [(files[1], files[1:])]),
        (["base.jsonl", "adapter.jsonl"], [("base.jsonl", ["base.jsonl"]), ("adapter.jsonl", ["adapter.jsonl"])]),
    ]:
        assert [(each.name, [str(file) for file in each.files]) for each in find_sources(names)] == expected


def test_the_tokenizer_is_the_runs_own(run: Path) -> None:
    for folder in ("checkpoint-9", "checkpoint-10"):
        make_tokenizer().save_pretrained(run / folder)
    for name in ("run", "run/trees", "run/trees/trees_000000.jsonl"):
        (source,) = find_sources([name])
        assert source.tokenizer_folder() == run / "checkpoint-10"
    make_tokenizer().save_pretrained(run)
    assert find_sources(["run"])[0].tokenizer_folder() == run
    (decode,) = load_decoders(find_sources(["run"]), None)
    assert decode is not None
    assert decode([5, 6, 0]) == "w0 w1 <eos>"


def each_log(run: Path, change: Callable[[Path], object]) -> None:
    for file in (run / "trees").iterdir():
        change(file)


CUT = '{"step": 12, "pro'
CHANGES: dict[str, Callable[[Path], object]] = {
    "broken": lambda run: each_log(run, lambda file: file.write_text(file.read_text() + CUT)),
    "emptied": lambda run: each_log(run, lambda file: file.write_text("")),
    "without a log": lambda run: each_log(run, Path.unlink),
    "with a page": lambda run: Path("trees.html").write_text("mine"),
    "unchanged": lambda run: None,
}


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ("broken", ["run"], r"run/trees/trees_000000\.jsonl, line 2: it is no JSON from character"),
        ("emptied", ["run"], r"`run` holds no trees: its 2 files are empty\."),
        ("without a log", ["run"], r"`run` has no tree log.*`log_trees: true`\."),
        ("with a page", ["run"], r"`--out trees\.html` exists already\. Remove it, or name another file\."),
        ("unchanged", [], r"Name what to view"),
        ("unchanged", ["gone"], r"`gone` does not exist"),
        ("unchanged", ["run", "./run"], r"run/trees/trees_000000\.jsonl is given twice"),
        ("unchanged", ["run", "--tokenizer", "./gone"], r"\./gone"),
        ("unchanged", ["run", "--serve", "--out", "a.html"], r"`--serve` writes no file"),
        ("unchanged", ["run", "--port", "8000"], r"`--port` is for `--serve`"),
        ("unchanged", ["run", "--serve", "--port", "70000"], r"`port` is 70000; it must be from 0 to 65535"),
        ("unchanged", ["run", "--ouput", "a.html"], r"--ouput"),
    ],
)
def test_errors_are_one_line_and_leave_no_page(run: Path, change: str, argv: list[str], message: str) -> None:
    CHANGES[change](run)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as error:
        main(argv)
    text = str(error.value.code)
    assert re.fullmatch(rf"treepo-trl: error: .*{message}.*", text), text
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_server_runs_until_it_is_interrupted(run: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "treepo_trl.cli", "view", "run", "--serve"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests that were started in the background ignore Ctrl-C, and their children with them.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        try:
            url = first.split()[3]
            assert first.startswith("3 trees at http://127.0.0.1:")
            assert urllib.request.urlopen(url, timeout=30).read().startswith(b"<!doctype html>")
        finally:
            process.send_signal(2)
        assert process.wait(timeout=30) == 0
    assert not list(Path().glob("*.html"))
