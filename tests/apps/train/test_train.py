"""`treepo-trl train` and the example script, on a tiny model and local files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig
from trl import ModelConfig

from tests.support.paths import ROOT
from tests.support.sample_runs import fail_to_build
from tests.support.train_runs import FLAGS, arguments, settings
from treepo_trl import TreePOConfig
from treepo_trl.apps.train.command import check_memory, load_reward_funcs, main
from treepo_trl.apps.view.command import main as view
from treepo_trl.command_line.arguments import TreePOScriptArguments, options_parser
from treepo_trl.memory import GIB


pytestmark = pytest.mark.usefixtures("training_folder")

FLAGS_OF_A_CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]


def test_full_fine_tuning(tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = ["my_rewards.even", "my_rewards.short"]
    main(arguments(tiny_model_dir, reward_funcs=rewards, log_trees=True, disable_tqdm=False))
    assert sys.modules["my_rewards"].calls == [4, 4]
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    after = AutoModelForCausalLM.from_pretrained("out", dtype="float32")
    changes = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(changes) > 1e-4
    trees = [json.loads(line) for line in Path("out/trees/trees_000001.jsonl").read_text().splitlines()]
    assert len(trees) == 1
    output = capsys.readouterr()
    assert "Model saved to out." in output.out
    assert "step 2/2  reward " in output.out + output.err
    view(["out", "--health"])
    assert capsys.readouterr().out.startswith("out (trainer_state.json up to step 2): no findings.")


def test_config_file_and_evaluation(tiny_model_dir: str) -> None:
    """A YAML file alone, a saved DatasetDict, and evaluation on its test split."""
    rows = Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)]})
    DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk("saved")
    config = settings(tiny_model_dir, dataset_name="saved", branch_schedule="early", initial_branching_factor=[1, 3])
    config |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    config |= {"save_strategy": "steps", "save_steps": 2}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["--config", "config.yaml"])
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert sum("eval_reward" in log for log in state["log_history"]) == 2
    assert sum("tree/leaf_tokens" in log for log in state["log_history"]) == 2
    args = torch.load("out/training_args.bin", weights_only=False)
    assert args.initial_branching_factor == [1, 3]
    # and on from there, with the flag over the file
    main(["--config", "config.yaml", "--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-2"])
    assert sys.modules["my_rewards"].calls.count(4) >= 3


def test_streaming(tiny_model_dir: str) -> None:
    main(arguments(tiny_model_dir, dataset_streaming=True))
    assert sys.modules["my_rewards"].calls == [4, 4]


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
        ({"reward_funcs": ["no_reward"]}, r"`--reward_funcs no_reward` is no reward.*accuracy_reward.*import path"),
        ({"reward_funcs": ["no_module.f"]}, r"`--reward_funcs no_module.f` could not be loaded: No module named"),
        ({"reward_funcs": ["my_rewards.a"]}, r"`--reward_funcs my_rewards.a` could not be loaded: .*no attribute 'a'"),
        ({"reward_funcs": None}, r"No reward: give `--reward_funcs`"),
        ({"model_name_or_path": None}, r"No model: give `--model_name_or_path`"),
        ({"model_name_or_path": "./none"}, r"`--model_name_or_path ./none` looks like a folder, but there is none"),
        ({"dataset_name": None}, r"No dataset: give `--dataset_name`"),
        ({"dataset_train_split": "a", "dataset_name": "saved"}, r"no split 'a', only train.*`--dataset_train_split`"),
        ({"eval_strategy": "steps", "eval_steps": 1}, r"no split 'test', only train.*`--dataset_test_split`"),
        ({"segment_length": 9}, r"`segment_length` is 9.*`max_completion_length` \(8\)"),
        ({"reward_funcs": ["my_rewards.calls"]}, r"`--reward_funcs my_rewards.calls` is a list.*give a function"),
        ({"reward_funcs": ["..a"]}, r"`--reward_funcs ..a` is no reward of TRL.*import path"),
        ({"resume_from_checkpoint": "true"}, r"`resume_from_checkpoint=True`.*\(out\) holds no intact checkpoint"),
        ({"resume_from_checkpoint": "none"}, r"`resume_from_checkpoint=none`.*no such folder"),
        ({"output_dir": "data.jsonl"}, r"`--output_dir data.jsonl` cannot be made: File exists"),
        ({"output_dir": "data.jsonl/out"}, r"`--output_dir data.jsonl/out` cannot be made: Not a directory"),
        (
            {"model_name_or_path": "adapter"},
            r"`--model_name_or_path adapter` is an adapter.*the model that it belongs",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: str, changes: dict[str, Any], message: str) -> None:
    """In one line without a traceback, and before the model is loaded."""
    monkeypatch.setattr("treepo_trl.treepo_trainer.TreePOTrainer.__init__", fail_to_build)
    DatasetDict({"train": Dataset.from_dict({"prompt": ["w1"] * 8})}).save_to_disk("saved")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").touch()
    with pytest.raises(SystemExit, match="treepo-trl: error: .*" + message):
        main(arguments(tiny_model_dir, **{**changes}))


def test_what_the_trainer_refuses_is_one_line_too(tiny_model_dir: str) -> None:
    with pytest.raises(SystemExit, match=r"^treepo-trl: error: Number of reward weights \(2\)"):
        main(arguments(tiny_model_dir, reward_weights=[1.0, 1.0]))


@pytest.mark.parametrize(
    ("given", "expected"), [("true", "out/checkpoint-2"), ("out/checkpoint-1", "out/checkpoint-1"), ("false", None)]
)
def test_the_checkpoint_is_chosen_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: str, given: str, expected: str | None
) -> None:
    """`true` takes the newest one, whose newer neighbour was not written to its end."""
    for step in (1, 2, 3):
        checkpoint = Path(f"out/checkpoint-{step}")
        checkpoint.mkdir(parents=True)
        save_file({"w": torch.zeros(1)}, checkpoint / "model.safetensors")
        if step < 3:
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "train_batch_size": 2}))
    calls: list[str | None] = []

    class Trainer:
        def __init__(self, **settings: Any) -> None:
            pass

        def pop_callback(self, callback: object) -> None:
            """As with `disable_tqdm`: there is none."""

        def train(self, resume_from_checkpoint: str | None) -> None:
            calls.append(resume_from_checkpoint)
            raise KeyboardInterrupt

    monkeypatch.setattr("treepo_trl.treepo_trainer.TreePOTrainer", Trainer)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(tiny_model_dir, resume_from_checkpoint=given))
    assert calls == [expected]


def test_one_reward_in_a_config_file_needs_no_list() -> None:
    Path("one.yaml").write_text("reward_funcs: my_rewards.even\n")
    script_args = options_parser(None, TreePOScriptArguments).parse_args_and_config(["--config", "one.yaml"])[0]
    assert script_args.reward_funcs == ["my_rewards.even"]


@pytest.mark.parametrize("source", ["flag", "config"])
def test_an_unknown_option_is_named(tiny_model_dir: str, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(yaml.safe_dump({**FLAGS, "segment_lenght": 4}))
    more = ["--segment_lenght", "4"] if source == "flag" else ["--config", "config.yaml"]
    with pytest.raises((SystemExit, ValueError)) as error:
        main([*arguments(tiny_model_dir), *more])
    assert "segment_lenght" in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"segment_length: [4\n", "no YAML.*line 2"),
        (b"x: \xff", "no YAML.*decode byte"),
        (b"x: \x00", "no YAML.*special characters"),
        (b"- a", "a setting per line"),
        (b"", "a setting per line"),
        (b"1: 2", "a setting per line"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("flag", ["--config config.yaml", "--config=config.yaml"])
def test_a_broken_config_is_one_line(flag: str, content: bytes | None, message: str) -> None:
    if content is not None:
        Path("config.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^treepo-trl: error: `--config config\.yaml`.*{message}.*$") as error:
        main(flag.split())
    assert "\n" not in str(error.value.code)


def test_a_config_is_found_behind_an_equals_sign_too() -> None:
    Path("config.yaml").write_text("segment_length: 9\n")
    with pytest.raises(SystemExit, match="`segment_length` is 9"):
        main(["--config=config.yaml", "--max_completion_length", "8", *FLAGS_OF_A_CPU])


def test_a_value_whose_type_transformers_takes_for_granted() -> None:
    Path("config.yaml").write_text("metric_for_best_model: true\n")
    with pytest.raises(SystemExit, match=r"^treepo-trl: error: True is of a wrong type for its setting"):
        main(["--config=config.yaml", *FLAGS_OF_A_CPU])


@pytest.mark.parametrize("argv", [["--num_generations", "x"], ["--config"], ["--config", "--seed", "1"]])
def test_what_the_parser_refuses_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Not behind the hundreds of lines that list the options."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert re.fullmatch(r"treepo-trl train: error: argument --.*\n", capsys.readouterr().err)


# The memory is planned before a training


@pytest.fixture
def check_on_small_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`check_memory` of a training on a machine with one GPU of 0.2 GiB."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    properties = SimpleNamespace(total_memory=int(0.2 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)

    def check(model: str, **changes: Any) -> None:
        options = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": True}
        args = TreePOConfig(str(tmp_path), max_completion_length=100, vllm_max_model_length=120, **options)
        # `TreePOConfig` itself refuses a training on a GPU where there is none.
        machine = {"use_cpu": False, "world_size": 1, "deepspeed": None, "fsdp": None, "trust_remote_code": False}
        training: Any = SimpleNamespace(**{**vars(args), **machine, **changes})
        check_memory(training, ModelConfig(model, dtype="bfloat16", use_peft=True, lora_target_modules=["all-linear"]))

    return check


def test_a_training_that_cannot_fit_is_refused(check_on_small_gpu: Callable[..., None], small_model_dir: str) -> None:
    with pytest.raises(ValueError, match=r"weights and gradients take 0\.3 GiB, the card has 0\.2"):
        check_on_small_gpu(small_model_dir)


@pytest.mark.parametrize(
    "changes", [{"use_cpu": True}, {"world_size": 2}, {"deepspeed": "zero3.json"}, {"fsdp": "full_shard"}]
)
def test_other_machines_are_not_planned(
    check_on_small_gpu: Callable[..., None],
    small_model_dir: str,
    changes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_on_small_gpu(small_model_dir, **changes)
    assert capsys.readouterr().out == ""


def test_a_planned_share_is_set_or_the_reason_is_said(
    check_on_small_gpu: Callable[..., None], small_model_dir: str, tmp_path: Path
) -> None:
    auto = {"vllm_gpu_memory_utilization": "auto", "use_vllm": True}
    with pytest.raises(ValueError, match=r"'auto'` is planned for one GPU in one process.*Give a number"):
        check_on_small_gpu(small_model_dir, world_size=2, **auto)
    with pytest.raises(ValueError, match=r"'auto'`, but this training cannot be planned: .*Give a number"):
        check_on_small_gpu(str(tmp_path / "nothing"), **auto)
    with pytest.raises(ValueError, match="weights and gradients take"):
        check_on_small_gpu(small_model_dir, **auto)


def test_neither_an_estimate_nor_an_unknown_model_stops_a_training(
    check_on_small_gpu: Callable[..., None], tmp_path: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_on_small_gpu(tiny_model_dir)
    assert "May not fit: The update takes" in capsys.readouterr().out
    FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    check_on_small_gpu(str(tmp_path))
    assert "Memory is not planned for this training" in capsys.readouterr().out


# The example script


def test_example_script(tiny_model_dir: str) -> None:
    """In a process of its own, from a config file; the example needs no more than the installed package."""
    config = settings(tiny_model_dir, use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    Path("config.yaml").write_text(yaml.safe_dump(config))
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
    adapter = json.loads(Path("out/adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (4, ["q_proj", "v_proj"])
    weights = load_file("out/adapter_model.safetensors")
    assert any("lora_B" in name and weights[name].abs().max() > 0 for name in weights)
    assert not Path("out/model.safetensors").exists()
    # the logged metrics reach a user's terminal
    assert "tree/leaf_tokens" in result.stdout
