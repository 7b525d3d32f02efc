"""`treepo-trl train` and the example script, on a tiny model and local files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconConfig
from trl import ModelConfig

from tests.support.paths import ROOT
from treepo_trl import TreePOConfig
from treepo_trl.commands.arguments import TreePOScriptArguments
from treepo_trl.commands.train import check_memory, load_reward_funcs, main
from treepo_trl.memory import GIB


REWARDS = """
calls = []


def even(completion_ids, **kwargs):
    calls.append(len(completion_ids))
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def short(completions, answer, **kwargs):
    return [-float(len(c)) for c in completions]
"""
FLAGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "segment_length": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "dtype": "float32",
    "disable_tqdm": True,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's working folder: a dataset, a module of rewards, and no package."""
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": str(i)} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def arguments(model: str, **changes: Any) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": "data.jsonl",
        "reward_funcs": ["my_rewards.even"],
        "output_dir": "out",
        **FLAGS,
        **changes,
    }
    result: list[str] = []
    for name, value in flags.items():
        if value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return result


def test_full_fine_tuning(folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(tiny_model_dir, reward_funcs=["my_rewards.even", "my_rewards.short"], log_trees=True))
    assert sys.modules["my_rewards"].calls == [4, 4]
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    after = AutoModelForCausalLM.from_pretrained(folder / "out", dtype="float32")
    changes = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(changes) > 1e-4
    trees = [json.loads(line) for line in (folder / "out/trees/trees_000001.jsonl").read_text().splitlines()]
    assert len(trees) == 1
    assert "Model saved to out." in capsys.readouterr().out


def test_lora(folder: Path, tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "v_proj"]))
    adapter = json.loads((folder / "out/adapter_config.json").read_text())
    assert adapter["r"] == 4
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    weights = load_file(folder / "out/adapter_model.safetensors")
    assert any("lora_B" in name and weights[name].abs().max() > 0 for name in weights)
    assert not (folder / "out/model.safetensors").exists()


def test_config_file_and_evaluation(folder: Path, tiny_model_dir: str) -> None:
    """A YAML file alone, a saved DatasetDict, and evaluation on its test split."""
    rows = Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)]})
    DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk("saved")
    config = {
        **FLAGS,
        "model_name_or_path": tiny_model_dir,
        "dataset_name": "saved",
        "reward_funcs": ["my_rewards.even"],
        "output_dir": "out",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "initial_branching_factor": [1, 3],
        "save_strategy": "steps",
        "save_steps": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["--config", "config.yaml"])
    state = json.loads((folder / "out/checkpoint-2/trainer_state.json").read_text())
    assert sum("eval_reward" in log for log in state["log_history"]) == 2
    assert sum("tree/leaf_tokens" in log for log in state["log_history"]) == 2
    args = torch.load(folder / "out/training_args.bin", weights_only=False)
    assert args.initial_branching_factor == [1, 3]
    # and on from there, with the flag over the file
    main(["--config", "config.yaml", "--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2"])
    assert sys.modules["my_rewards"].calls.count(4) >= 3


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_kinds_of_files(folder: Path, tiny_model_dir: str, suffix: str) -> None:
    data = Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)], "answer": ["a"] * 8})
    write: dict[str, Callable[[str], Any]] = {".json": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}
    write[suffix](f"other{suffix}")
    main(arguments(tiny_model_dir, dataset_name=f"other{suffix}", max_steps=1))
    assert sys.modules["my_rewards"].calls == [4]


def test_streaming(folder: Path, tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, dataset_streaming=True))
    assert sys.modules["my_rewards"].calls == [4, 4]


def test_reward_model(folder: Path, tiny_model_dir: str) -> None:
    from transformers import AutoModelForSequenceClassification

    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype="float32")
    reward_model.save_pretrained("reward")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "reward" / file).write_bytes((Path(tiny_model_dir) / file).read_bytes())
    main(arguments(tiny_model_dir, reward_model_name_or_path="reward", reward_funcs=None))
    assert (folder / "out/model.safetensors").exists()


def test_rewards_by_name() -> None:
    from trl.rewards import accuracy_reward, think_format_reward

    names = ["accuracy_reward", "think_format_reward", "get_soft_overlong_punishment", "trl.rewards.accuracy_reward"]
    lengths = SimpleNamespace(max_completion_length=20, segment_length=4)
    functions = load_reward_funcs(TreePOScriptArguments(dataset_name="x", reward_funcs=names), lengths)
    assert functions[0] is accuracy_reward
    assert functions[1] is think_format_reward
    # The last segment of 4 of 20 tokens: none up to 16, then a quarter more per token.
    assert functions[2](completion_ids=[[0] * n for n in (1, 16, 17, 19, 20)]) == [0, 0, -0.25, -0.75, -1]
    assert functions[3] is accuracy_reward
    with_model = TreePOScriptArguments(dataset_name="x", reward_model_name_or_path="model", reward_funcs=names[:1])
    assert load_reward_funcs(with_model, lengths) == ["model", accuracy_reward]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_funcs": ["no_such_reward"]},
            r"`--reward_funcs no_such_reward` is no reward.*accuracy_reward.*import path",
        ),
        (
            {"reward_funcs": ["no_module.f"]},
            r"`--reward_funcs no_module.f` could not be loaded: No module named 'no_module'",
        ),
        (
            {"reward_funcs": ["my_rewards.none"]},
            r"`--reward_funcs my_rewards.none` could not be loaded: .*no attribute 'none'",
        ),
        ({"reward_funcs": None}, r"No reward: give `--reward_funcs`"),
        ({"model_name_or_path": None}, r"No model: give `--model_name_or_path`"),
        ({"dataset_name": None}, r"No dataset: give `--dataset_name`"),
        (
            {"dataset_train_split": "training", "dataset_name": "saved"},
            r"no split 'training', only train.*`--dataset_train_split`",
        ),
        ({"eval_strategy": "steps", "eval_steps": 1}, r"no split 'test', only train.*`--dataset_test_split`"),
        ({"dataset_name": "my_rewards.py"}, r"`--dataset_name my_rewards.py` ends in '.py'; known are .json"),
        ({"segment_length": 9}, r"`segment_length` is 9.*`max_completion_length` \(8\)"),
        ({"fallback_policy": "none"}, r"`fallback_policy='none'`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(folder: Path, tiny_model_dir: str, changes: dict[str, Any], message: str) -> None:
    DatasetDict({"train": Dataset.from_dict({"prompt": ["w1"] * 8})}).save_to_disk("saved")
    with pytest.raises(SystemExit, match="treepo-trl: error: .*" + message):  # one line, no traceback
        main(arguments(tiny_model_dir, **changes))


def test_dataset_without_prompts(folder: Path, tiny_model_dir: str) -> None:
    (folder / "text.txt").write_text("w1\nw2\n")
    with pytest.raises(ValueError, match="no column 'prompt', only text"):
        main(arguments(tiny_model_dir, dataset_name="text.txt"))


def test_unknown_option(folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        main([*arguments(tiny_model_dir), "--segment_lenght", "4"])
    assert "--segment_lenght" in capsys.readouterr().err + str(error.value)


def test_unknown_key_in_the_config(folder: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({**FLAGS, "segment_lenght": 4}))
    with pytest.raises((SystemExit, ValueError)) as error:
        main([*arguments(tiny_model_dir), "--config", "config.yaml"])
    assert "segment_lenght" in capsys.readouterr().err + str(error.value)


def test_a_broken_config_is_one_line(folder: Path, tiny_model_dir: str) -> None:
    (folder / "config.yaml").write_text("segment_length: [4\n")
    with pytest.raises(SystemExit, match=r"(?s)treepo-trl: error: .*config\.yaml"):
        main([*arguments(tiny_model_dir), "--config", "config.yaml"])


def test_help_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--segment_length",
        "--branching_factor",
        "--tree_packing",
        "--use_peft",
        "--dataset_name",
        "--reward_funcs",
    ):
        assert flag in text


# The memory is planned before a training


@pytest.fixture
def one_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with one GPU of 0.2 GiB."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    properties = SimpleNamespace(total_memory=int(0.2 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)


def planned(tmp_path: Path, model: str, **changes: Any) -> tuple[Any, ModelConfig]:
    """Arguments of a training as on a GPU, which `TreePOConfig` itself refuses on a machine without one."""
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": True}
    args = TreePOConfig(output_dir=str(tmp_path), max_completion_length=100, vllm_max_model_length=120, **settings)
    settings = {"use_cpu": False, "world_size": 1, "deepspeed": None, "fsdp": None, **changes}
    training = SimpleNamespace(**{**vars(args), **settings, "trust_remote_code": False})
    return training, ModelConfig(model, dtype="bfloat16", use_peft=True, lora_target_modules=["all-linear"])


@pytest.mark.usefixtures("one_small_gpu")
def test_a_training_that_cannot_fit_is_refused(tmp_path: Path, small_model_dir: str) -> None:
    with pytest.raises(ValueError, match=r"weights and gradients take 0\.3 GiB, the card has 0\.2"):
        check_memory(*planned(tmp_path, small_model_dir))


@pytest.mark.usefixtures("one_small_gpu")
@pytest.mark.parametrize(
    "changes", [{"use_cpu": True}, {"world_size": 2}, {"deepspeed": "zero3.json"}, {"fsdp": "full_shard"}]
)
def test_other_machines_are_not_planned(
    tmp_path: Path, small_model_dir: str, changes: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    check_memory(*planned(tmp_path, small_model_dir, **changes))
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("one_small_gpu")
def test_a_model_that_cannot_be_planned_is_trained_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    check_memory(*planned(tmp_path, str(tmp_path)))
    assert "Memory is not planned for this training" in capsys.readouterr().out


@pytest.mark.usefixtures("one_small_gpu")
def test_an_estimate_does_not_stop_a_training(
    tmp_path: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture
) -> None:
    check_memory(*planned(tmp_path, tiny_model_dir))
    assert "May not fit: The update takes" in capsys.readouterr().out


# The example script


def test_example_script(folder: Path, tiny_model_dir: str) -> None:
    """In a process of its own, from a config file; the example needs no more than the installed package."""
    config = {
        **FLAGS,
        "model_name_or_path": tiny_model_dir,
        "dataset_name": "data.jsonl",
        "reward_funcs": ["my_rewards.even"],
        "output_dir": "out",
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples/scripts/treepo.py"), "--config", "config.yaml"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Model saved to out." in result.stdout
    assert (folder / "out/adapter_model.safetensors").exists()
    # the logged metrics reach a user's terminal
    assert "tree/leaf_tokens" in result.stdout
