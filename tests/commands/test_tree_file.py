"""What the output file of `treepo-trl sample` keeps of a run that dies, and that `--resume` goes on from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.sample_runs import PROMPT_IDS, arguments, cells, fail_to_build, read_lines, read_trees
from treepo_trl.commands import sample as sample_command
from treepo_trl.commands.sample import main
from treepo_trl.engines import SegmentResult
from treepo_trl.engines.transformers import TransformersEngine


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
    write = sample_command.write_tree

    def write_and_interrupt(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_command, "write_tree", write_and_interrupt)
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


def test_a_file_of_the_version_before_is_resumed(tiny_model_dir: str) -> None:
    """Its leaves are in the order of their ends, not depth-first, and so are the texts beside them."""
    nodes = [(None, [5], None), (None, [9], None), (1, [10, 0], "stop"), (0, [11, 0], "stop")]
    keys = ("parent", "token_ids", "finish_reason")
    tree = {
        "prompt_ids": PROMPT_IDS[0],
        "nodes": [{**dict(zip(keys, node, strict=True)), "logprobs": [-1.0] * len(node[1])} for node in nodes],
        "leaves": [2, 3],
    }
    record = {"index": 0, "prompt": "w1 w2 w3", "completions": ["w4 w5", "w0 w6"], "weights": [0.5, 0.5], "tree": tree}
    Path("trees.jsonl").write_text(json.dumps(record) + "\n")
    main([*arguments(tiny_model_dir), "--resume"])
    assert json.loads(Path("trees.jsonl").read_text().splitlines()[0]) == record
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS
    old = read_trees()[0]
    assert [old.completion_ids(leaf) for leaf in old.leaves] == [[9, 10, 0], [5, 11, 0]]


def test_a_resumed_run_does_not_draw_the_same_again(tiny_model_dir: str) -> None:
    """The same prompt twice, in two runs with the same seed."""
    Path("data.jsonl").write_text('{"prompt": "w1 w2"}\n')
    main(arguments(tiny_model_dir))
    Path("data.jsonl").write_text('{"prompt": "w1 w2"}\n' * 2)
    main([*arguments(tiny_model_dir), "--resume"])
    first, second = read_lines()
    assert first["prompt"] == second["prompt"]
    assert first["completions"] != second["completions"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "w1"}\n', "no tree of this command"),
        (b"some notes", "no tree of this command"),  # not a line that was cut off
        (b"\xff\xfe\n", "no tree of this command"),
        (b'{"index": 0, "tree": {"prompt_ids": [6, 7]}}\n', "a tree of another prompt 0"),
        (b'{"index": 4, "tree": {"prompt_ids": [6, 7, 8]}}\n', "a tree of another prompt 4"),
        (b'{"index": -4, "tree": {"prompt_ids": [6, 7, 8]}}\n', "a tree of another prompt -4"),
        (b'{"index": "0", "tree": {"prompt_ids": [6, 7, 8]}}\n', "a tree of another prompt '0'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    Path("trees.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        main([*arguments(tiny_model_dir), "--resume"])
    assert Path("trees.jsonl").read_bytes() == content
