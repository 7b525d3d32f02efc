"""`treepo-trl sample` on a tiny model: what it reads, writes and prints."""

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from datasets import Dataset, DatasetDict

from tests.support.sample_runs import (
    FLAGS,
    PROMPT_IDS,
    PROMPTS,
    arguments,
    cells,
    fail_to_build,
    read_lines,
    read_trees,
)
from treepo_trl.apps.sample import command as sample_command
from treepo_trl.apps.sample.command import main
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.sampling import SegmentTree, TreeSampler


pytestmark = pytest.mark.usefixtures("prompts_folder")


# What comes out


def test_the_output_has_a_tree_for_each_prompt_and_the_table_counts_them(
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, output="new/folder/trees.jsonl"))
    records, trees = read_lines("new/folder/trees.jsonl"), read_trees("new/folder/trees.jsonl")
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record["prompt"] for record in records] == PROMPTS
    assert [tree.prompt_ids for tree in trees] == PROMPT_IDS
    for record, tree in zip(records, trees, strict=True):
        assert len(tree.leaves) == len(record["completions"]) == len(record["weights"]) == 4
        for leaf, completion in zip(tree.leaves, record["completions"], strict=True):
            words = [f"w{token - 5}" for token in tree.completion_ids(leaf) if token >= 5]  # below: special tokens
            assert [word for word in completion.split() if word.startswith("w")] == words
        assert record["weights"] == pytest.approx(tree.leaf_weights())
    out, err = capsys.readouterr()
    rows = cells(out)
    assert all(line.startswith("|") for line in out.splitlines())  # nothing but the table: it can be piped
    assert "16/16" in err  # the bar counted every leaf
    assert rows["trajectories (leaves)"] == ["16"]
    assert rows["unique tokens"] == [str(sum(len(node.token_ids) for tree in trees for node in tree.nodes))]
    assert int(rows["unique tokens"][0]) < int(rows["leaf tokens"][0])  # something is shared


def test_without_an_output_the_first_prompts_completions_are_shown(
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, seed=3))
    record = read_lines("trees.jsonl")[0]
    capsys.readouterr()
    main(arguments(tiny_model_dir, seed=3, output=None))
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
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str], rule: dict[str, Any], is_said: bool
) -> None:
    main(arguments(tiny_model_dir, compare="independent", repeats=1, **rule))
    assert ("end paths of trees early" in capsys.readouterr().err) == is_said


def test_the_seed_decides_the_trees(tiny_model_dir: str) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        main(arguments(tiny_model_dir, output=name, seed=seed))
    texts = {name: [record["completions"] for record in read_lines(name)] for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_a_config_file_does_what_flags_do(tiny_model_dir: str) -> None:
    settings = {**FLAGS, "model_name_or_path": tiny_model_dir, "dataset_name": "data.jsonl", "seed": 3}
    settings |= {"temperature": 0.7, "branch_schedule": "early", "initial_branching_factor": [1, 3], "output": "a"}
    Path("sample.yaml").write_text(yaml.safe_dump(settings))
    main(["--config", "sample.yaml"])
    main(
        arguments(
            tiny_model_dir,
            seed=3,
            temperature=0.7,
            branch_schedule="early",
            initial_branching_factor=[1, 3],
            output="b",
        )
    )
    assert read_lines("a") == read_lines("b")
    main(["--config", "sample.yaml", "--output", "c", "--num_generations", "3"])  # a flag wins
    assert {len(tree.leaves) for tree in read_trees("c")} == {3}


def test_the_entropy_policy_gets_its_entropies(tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, branching_policy="entropy"))
    assert all(node.entropy is not None and node.entropy >= 0 for tree in read_trees() for node in tree.nodes)


def test_sampling_options_reach_the_engine(tiny_model_dir: str) -> None:
    """A huge penalty never repeats a token."""
    main(arguments(tiny_model_dir, repetition_penalty=1e9))
    sequences = [tree.sequence_ids(leaf) for tree in read_trees() for leaf in tree.leaves]
    assert all(len(set(sequence)) == len(sequence) for sequence in sequences)


# What goes in


def test_messages_get_the_chat_template_and_its_arguments(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
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


# Errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": None}, ["No model", "--model_name_or_path"]),
        ({"model_name_or_path": "no/model"}, ["error:"]),
        ({"dataset_name": "-"}, ["Standard input holds no prompts", "--dataset_name"]),
        ({"prompt_column": "question"}, ["no column 'question'", "prompt, answer", "--prompt_column"]),
        ({"dataset_name": "saved", "dataset_split": "test"}, ["no split 'test'", "a, b", "--dataset_split"]),
        ({"dataset_name": "answers.jsonl"}, ["Prompt 0 is 1", "give text, or a list of messages"]),
        ({"dataset_name": "wide.jsonl"}, ["no column 'prompt'", "a, b", "--prompt_column"]),
        ({"output": "."}, ["directory"]),
        ({"temperature": -1}, ["`temperature` is -1.0", "0 (greedy) or more"]),
        ({"repeats": 0}, ["`repeats` is 0", "at least 1"]),
        ({"max_prompts": 0}, ["`max_prompts` is 0", "at least 1"]),
        ({"compare": "independent", "resume": True}, ["--compare", "--resume", "Choose one"]),
        ({"chat_template_kwargs": "{a"}, ["`chat_template_kwargs` is '{a'", "JSON object"]),
        ({"chat_template_kwargs": "[1]"}, ["`chat_template_kwargs` is [1]", "JSON object"]),
        ({"segment_length": 13}, ["`segment_length` is 13", "12"]),
        ({"unknown": 1}, ["--unknown"]),
    ],
)
def test_user_errors_are_one_line_before_the_model_is_loaded(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    rows = Dataset.from_dict({"a": ["w1"], "b": ["w2"]})
    rows.to_json("wide.jsonl")
    DatasetDict({"a": rows, "b": rows}).save_to_disk("saved")
    Path("answers.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(SystemExit) as error:
        main(arguments(**{"model_name_or_path": tiny_model_dir, **changes}))
    for word in ("treepo-trl: error: ", *words):
        assert word in str(error.value.code)
    assert not Path("trees.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compare": "greedy"}, "`compare` is 'greedy'. Choose one of 'independent'"),
        ({"repeats": 1.5}, "`repeats` is 1.5 (float); it must be a whole number"),
        ({"max_prompts": 1.5}, "`max_prompts` is 1.5 (float); it must be a whole number"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_config_file_is_checked_as_flags_are(settings: dict[str, Any], words: str) -> None:
    """argparse checks neither the choices nor the types of what comes from the file."""
    Path("sample.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as error:
        main(["--config", "sample.yaml"])
    assert words in str(error.value.code)


@pytest.mark.parametrize(
    ("prompt", "words"), [("w1 " * 600, ["600 tokens", "context of 512"]), ("", ["Prompt 0", "empty"])]
)
def test_a_prompt_that_cannot_be_continued(tiny_model_dir: str, prompt: str, words: list[str]) -> None:
    Path("data.jsonl").write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(SystemExit) as error:
        main(arguments(tiny_model_dir))
    for word in words:
        assert word in str(error.value.code)


# Compare


def test_compare_samples_both_in_turn_and_prints_the_ratio(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []

    def record(owner: Any, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, len(args[0]) if args else 0))
            return function(first, *args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    record(TreeSampler, "sample", "trees")
    record(sample_command, "sample_independent", "independent")
    record(TransformersEngine, "reset_prefix_cache", "reset")
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


def test_every_seed_and_every_round_has_its_own_branching_draws(tiny_model_dir: str) -> None:
    with patch.object(TreeSampler, "sample", autospec=True, side_effect=TreeSampler.sample) as sample:
        for seed in (3, 4):
            main(arguments(tiny_model_dir, output=None, seed=seed, compare="independent", repeats=2))
    assert len({call.args[2] for call in sample.call_args_list}) == sample.call_count == 4
