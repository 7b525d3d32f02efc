"""What the output file of `treepo-trl sample` keeps of a run that dies, and that `--resume` goes on from it."""

import errno
import json
import re
import subprocess
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_tokenizer
from tests.support.sample_runs import PROMPT_IDS, arguments, cells, fail_to_build, read_lines, read_trees
from treepo_trl.apps.sample import command as sample_command
from treepo_trl.apps.sample.command import main
from treepo_trl.command_line.tree_file import OutputError, TreeFile, opened_output
from treepo_trl.engines import SegmentResult
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.sampling import SegmentTree


pytestmark = pytest.mark.usefixtures("prompts_folder")


class Lost(RuntimeError):
    """An engine that fails."""


def test_an_error_keeps_the_trees_that_are_done_and_resume_samples_the_others(
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each tree is on the disk as soon as it is done: then not even a killed process takes it along."""
    collect = TransformersEngine.collect

    def collect_or_fail(engine: TransformersEngine) -> list[SegmentResult]:
        if Path("trees.jsonl").read_bytes().count(b"\n") >= 1:
            raise Lost
        return collect(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "collect", collect_or_fail)
        patch.setattr(TransformersEngine, "num_slots", lambda engine, length: 2)  # one tree after the other
        with pytest.raises(Lost) as error:
            main(arguments(tiny_model_dir))
    assert any("--resume" in note and "trees.jsonl" in note for note in error.value.__notes__)
    kept = Path("trees.jsonl").read_bytes()
    num_kept = len(read_trees())
    assert 1 <= num_kept < 4
    with pytest.raises(SystemExit, match=r"trees\.jsonl` exists already.*--resume"):
        main(arguments(tiny_model_dir))
    assert Path("trees.jsonl").read_bytes() == kept
    capsys.readouterr()
    main([*arguments(tiny_model_dir), "--resume"])
    assert Path("trees.jsonl").read_bytes().startswith(kept)
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS
    assert [record["index"] for record in read_lines()] == [0, 1, 2, 3]
    out, err = capsys.readouterr()
    assert cells(out)["prompts"] == [str(4 - num_kept)]  # what this run sampled
    assert f"{num_kept} of 4 trees are in trees.jsonl already" in err
    num_leaves = 4 * (4 - num_kept)
    assert f"{num_leaves}/{num_leaves}" in err


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({}, r" .*`--resume` goes on from the trees in trees\.jsonl\."), ({"compare": "independent"}, "[^`]*")],
)
def test_an_interrupt_is_no_traceback(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], advice: str
) -> None:
    """A run that may be resumed says so; a comparison may not."""
    write = TreeFile.write

    def write_and_interrupt(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TreeFile, "write", write_and_interrupt)
    with pytest.raises(SystemExit, match=rf"^Interrupted\. While sampling prompt \d of 4{advice}$"):
        main(arguments(tiny_model_dir, **changes))
    assert len(read_trees()) == 1


@pytest.mark.parametrize("num_bytes", [1, 5, 10, 40])
def test_a_line_that_was_cut_off_is_sampled_again(tiny_model_dir: str, num_bytes: int) -> None:
    main(arguments(tiny_model_dir))
    lines = Path("trees.jsonl").read_bytes().splitlines(keepends=True)
    Path("trees.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:num_bytes])
    main([*arguments(tiny_model_dir), "--resume"])
    again = Path("trees.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS


def test_resume_starts_a_file_and_leaves_a_full_one_as_it_is(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments(tiny_model_dir), "--resume"])
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS
    content = Path("trees.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    main([*arguments(tiny_model_dir), "--resume"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "4 of 4 trees are in trees.jsonl already" in err
    assert Path("trees.jsonl").read_bytes() == content


def test_a_resumed_run_does_not_draw_the_same_again(tiny_model_dir: str) -> None:
    """The same prompt twice, in two runs with the same seed."""
    Path("data.jsonl").write_text('{"prompt": "w1 w2"}\n')
    main(arguments(tiny_model_dir))
    Path("data.jsonl").write_text('{"prompt": "w1 w2"}\n' * 2)
    main([*arguments(tiny_model_dir), "--resume"])
    first, second = read_lines()
    assert first["prompt"] == second["prompt"]
    assert first["completions"] != second["completions"]


TREE = SegmentTree(PROMPT_IDS[0])
TREE.add(None, [9, 0], [-1.0, -2.0], "stop")
LINE = {"index": 0, "prompt": "w1 w2 w3", "completions": ["w4"], "weights": [1.0], "tree": TREE.to_dict()}


def line(**changes: Any) -> bytes:
    """A line of the output with other values."""
    return json.dumps({**LINE, **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "w1"}\n', "line 1: the line has no `"),
        (b"some notes", "line 1: it is no JSON"),  # not a line that was cut off
        (line() + b"\xff\xfe\n", "line 2: byte 0 is no UTF-8"),
        (line() + b"\n", "line 2: it is no JSON"),
        (line(tree={**TREE.to_dict(), "prompt_ids": [6, 7]}), "line 1: it is a tree of other prompts"),
        (line(index=4), "line 1: it is a tree of other prompts"),
        (line(index=-4), "line 1: `index` is -4; it must be a whole number from 0 to"),
        (line(index="0"), "line 1: `index` is '0'; it must be"),
        (line() + line(), "line 2: `index` is 0, as in line 1"),
        (line(tree={**TREE.to_dict(), "leaves": "abc"}), "line 1: `leaves` is 'abc'; it must be a list"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_line_and_left_as_it_is(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    Path("trees.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^treepo-trl: error: trees\.jsonl, {words}.* or name another file\.$"):
        main([*arguments(tiny_model_dir), "--resume"])
    assert Path("trees.jsonl").read_bytes() == content


# Two runs, a full disk


def open_again(resume: bool = True) -> None:
    with opened_output("trees.jsonl", resume, PROMPT_IDS):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_into_the_same_file_is_refused_until_the_first_is_gone(
    resume: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under any name of the file, before anything is read or cut off. The lock dies with a killed process."""
    Path("trees.jsonl").write_bytes(line() + line(index=1)[:20] if resume else b"")
    content = Path("trees.jsonl").read_bytes()
    Path("link.jsonl").symlink_to("trees.jsonl")
    script = "import fcntl, time; file = open('link.jsonl', 'ab'); fcntl.flock(file, 2); print(flush=True); {}"
    command = [sys.executable, "-c", script.format("time.sleep(600)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(ValueError, match=r"^Another run writes to `--output trees\.jsonl`\. Wait for its end"):
                open_again(resume)
        finally:
            other.kill()
    assert Path("trees.jsonl").read_bytes() == content
    open_again(resume)
    with opened_output("link.jsonl", resume, PROMPT_IDS), pytest.raises(ValueError, match="Another run"):
        open_again(resume)
    open_again(resume)
    assert sorted(path.name for path in Path().iterdir()) == ["data.jsonl", "link.jsonl", "trees.jsonl"]
    assert capfd.readouterr().err == ""


def test_a_file_system_without_locks_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    open_again()
    assert (
        "trees.jsonl cannot be locked ([Errno 37] No locks available): start no other run" in capsys.readouterr().err
    )


class FullDisk(FileIO):
    """A file with room for one line and half of the next. Closing it fails too, with other words."""

    rest = 0

    def write(self, data: Any) -> int:
        if self.rest == len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        half = len(data) // 2 if self.tell() else len(data)
        self.rest = len(data) - half
        return super().write(data[:half])

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_full_disk_is_named_and_the_trees_before_it_stay_whole(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_full(path: Path, mode: str, **how: Any) -> Any:
        return FullDisk(path, "a+") if "a" in mode else opened(path, mode, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(SystemExit) as error:
            main(arguments(tiny_model_dir))
    full = "`--output trees.jsonl` cannot be written: No space left on device. Its disk has 0.00 GiB free."
    advice = "`--resume` goes on from the trees in trees.jsonl."
    assert re.sub(r"[0-9.]+ GiB", "0.00 GiB", str(error.value.code)) == f"treepo-trl: error: {full} {advice}"
    assert len(read_trees()) == 1
    main([*arguments(tiny_model_dir), "--resume"])
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("resume", [False, True])
def test_the_first_error_is_the_one_that_is_seen(resume: bool) -> None:
    def use(output: TreeFile | None) -> None:
        assert output is not None
        with pytest.raises(OutputError, match="`--output /dev/full` cannot be written: No space left on device"):
            output.write(0, TREE, make_tokenizer())
        raise Lost

    with pytest.raises(Lost), opened_output("/dev/full", resume, PROMPT_IDS) as output:
        use(output)
