"""Two processes on one CPU: whole trees per process, and the same update as one process with both."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.support.distributed import PROMPTS, SCRIPT, make_trainer
from tests.support.processes import run_in_two_processes
from tests.support.tools import WIDTH, ScriptedAgent, tool_config, tool_trainer
from tests.support.trainers import ReplayTrainer, assert_same_parameters, change, logs_of, parameters_of, parity_reward
from treepo_trl import SegmentTree
from treepo_trl.sampling.nodes import TokenReason


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
        | {"branching_factor": 1, "temperature": 4.0},
        {"lora": True, "beta": 0.1, "gradient_accumulation_steps": 2, "tree_packing": "sdpa"}
        | {"advantage_estimator": "treepo"},
        # Prompts of different length: the processes cut their trees into different numbers of pieces.
        pytest.param({"max_tokens_per_micro_batch": 60, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "pieces"],
)
def test_two_processes_update_as_one(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    accumulation = changes.get("gradient_accumulation_steps", 1)
    ranks = run_in_two_processes(
        SCRIPT, tmp_path, "train_and_write", tiny_model_dir, str(tmp_path), json.dumps(changes)
    )

    if "eval_strategy" in changes:
        # Without branching only the long prompt's rows share enough: one process packs, the other one does not.
        assert [rank["worth"][0] for rank in ranks] == [True, False]

    # Both processes hold the same model, and it has moved.
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_parameters(*parameters, 0.0)

    # Whole trees on each process, with seeds of their own; the metrics are totals over both.
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert len(logs) == len(ranks[0]["totals"]) == len(ranks[1]["totals"]) == 2
    for log, first, second in zip(logs, ranks[0]["totals"], ranks[1]["totals"], strict=True):
        assert first[2] == second[2] == accumulation
        assert first[3] != second[3]
        assert log["tree/leaf_tokens"] == first[0] + second[0]
        assert log["tree/unique_tokens"] == log["tree/decoded_tokens"] == first[1] + second[1]
        assert log["tree/leaf_unique_ratio"] == pytest.approx((first[0] + second[0]) / (first[1] + second[1]))
        reasons = [log[f"tree/finish_{reason}_frac"] for reason in get_args(TokenReason)]
        assert sum(reasons) == pytest.approx(1)

    # The tree log has the trees of both.
    recorded = []
    for step in range(2):
        lines = (tmp_path / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["prompt"] for record in records] == PROMPTS[2 * accumulation * step :][: 2 * accumulation]
        recorded.append([SegmentTree.from_dict(record["tree"]) for record in records])
        for record, tree in zip(records, recorded[-1], strict=True):
            rewards = parity_reward([tree.completion_ids(leaf) for leaf in record["rows"]])
            assert record["rewards"] == pytest.approx(rewards, abs=1e-5)
    logged = [value for record in records for value in record["advantages"]]
    if "advantage_estimator" in changes:  # the others have one per segment, and an evaluation puts its own there
        assert ranks[0]["logged_advantages"][-8:] == pytest.approx(logged[-8:], abs=1e-4)
    elif "eval_strategy" in changes:
        assert sum("eval_reward" in log for log in ranks[0]["logs"]) == 2

    # One process with all of these trees makes the same steps.
    lora = changes.pop("lora", False)
    changes = {k: v for k, v in changes.items() if "eval" not in k}
    single = make_trainer(
        tiny_model_dir, tmp_path / "single", ReplayTrainer, lora, per_device_train_batch_size=8, **changes
    )
    single.recorded = list(recorded)
    single.train()
    assert change(single) > 1e-2
    assert_same_parameters(parameters_of(single), parameters[0])
    for key in ("grad_norm", "reward", "reward_std"):
        assert [log[key] for log in logs] == pytest.approx(logs_of(single, key), abs=1e-4)


def test_two_processes_fill_one_batch(tmp_path: Path, tiny_model_dir: str) -> None:
    ranks = run_in_two_processes(SCRIPT, tmp_path, "train_dynamically_and_write", tiny_model_dir, str(tmp_path))
    first = ["w0 w1", "w4", "w7 w8", "w11 w12", "w15", "w16", "w17", "w18"]
    second = ["w2 w3", "w5 w6", "w9 w10", "w13 w14", "", "", "", ""]
    assert [[" ".join(prompts) for prompts in rank["sampled"]] for rank in ranks] == [first, second]
    expected = [{"w0", "w4", "w5", "w6"}, {"w7", "w8", "w9", "w10"}, {"w18", "w12", "w13", "w14"}]
    for first, second, prompts in zip(ranks[0]["updated"], ranks[1]["updated"], expected, strict=True):
        assert Counter(first + second) == dict.fromkeys(prompts, 4)
    assert min(ranks[0]["largest"] + ranks[1]["largest"]) > 0
    kept = ["w18", "w12", "w13", "w14"]  # the logs hold the last batch
    for rank in ranks:
        assert rank["prompts"][::4] == kept
        assert rank["extra"] == [f"{prompt}/{i}" for prompt in kept for i in range(4)]
        assert rank["rewards"] == [0.0, 1.0] * 8
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert [log["dynamic_sampling/rounds"] for log in logs] == [1, 0, 4]
    assert [log["dynamic_sampling/replaced_prompts"] for log in logs] == [3, 0, 4]
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_parameters(*parameters, 0.0)
    for step, log in enumerate(logs):
        lines = (tmp_path / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
        unique = sum(SegmentTree.from_dict(json.loads(line)["tree"]).num_unique_tokens for line in lines)
        assert len(lines) == 4
        assert log["tree/unique_tokens"] == unique + log["dynamic_sampling/discarded_tokens"]


def test_two_processes_select_the_same_prompts(tmp_path: Path, tiny_model_dir: str) -> None:
    ranks = run_in_two_processes(
        SCRIPT, tmp_path, "train_on_selected_prompts_and_write", tiny_model_dir, str(tmp_path)
    )
    for rank in ranks:
        assert rank["states"] == [ranks[0]["states"][0]] * 2  # places and pass rates, also of the resumed training
        whole, resumed = rank["sampled"]
        assert whole[-len(resumed) :] == resumed
        assert rank["error"].startswith("`prompt_selection` needs the same rows on every process")
    assert max(log.get("prompt_selection/frac_passed_over", 0) for log in ranks[0]["logs"]) > 0.3


@pytest.mark.slow
def test_two_processes_with_tools_update_as_one(tmp_path: Path) -> None:
    """Totals are over both processes, also where the paths of one call nothing."""
    ranks = run_in_two_processes(SCRIPT, tmp_path, "train_with_tools_and_write", str(tmp_path))
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_parameters(*parameters, 0.0)
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert len(logs) == 2
    for step, log in enumerate(logs):
        counts = [rank["turns"][step] for rank in ranks]
        assert counts[0]["executed"] > counts[1]["executed"] == 0
        _check_turn_metrics(log, counts)

    recorded = [_recorded_trees(tmp_path, step) for step in range(2)]
    settings = {"per_device_train_batch_size": 2 * WIDTH, "shuffle_dataset": False}
    single = tool_trainer(ReplayTrainer, tool_config(tmp_path / "single", **settings), ScriptedAgent())
    single.recorded = list(recorded)
    single.train()
    assert change(single) > 1e-2
    assert_same_parameters(parameters_of(single), parameters[0])
    for key in ("grad_norm", "reward", "reward_std", "tools/call_frequency", "tools/failure_frequency"):
        assert [log[key] for log in logs] == pytest.approx(logs_of(single, key), abs=1e-4), key


@pytest.mark.parametrize(
    "changes",
    [
        {"environment_forking": "auto", "tool_timeout": 60.0},
        # The second process has to replace all of its prompts, for nobody plays there.
        pytest.param({"environment_forking": "replay", "dynamic_sampling_rounds": 2}, marks=pytest.mark.slow),
    ],
    ids=["forks", "dynamic"],
)
def test_two_processes_with_environments(tmp_path: Path, changes: dict[str, Any]) -> None:
    ranks = run_in_two_processes(SCRIPT, tmp_path, "play_and_write", str(tmp_path), json.dumps(changes))
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_parameters(*parameters, 0.0)
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert len(logs) == 2
    assert sum(log["environment/resets"] for log in logs) == ranks[0]["resets"] + ranks[1]["resets"]
    if "dynamic_sampling_rounds" in changes:
        assert [log["dynamic_sampling/rounds"] for log in logs] == [2, 2]
        assert [log["dynamic_sampling/frac_without_signal"] for log in logs] == [0.5, 0.5]
        executed = [sum(count["executed"] for count in rank["turns"]) for rank in ranks]
        assert executed == [sum(log["tree/tool_calls"] for log in logs), 0]
        return
    for step, log in enumerate(logs):
        counts = [rank["turns"][step] for rank in ranks]
        assert counts[0]["executed"] > counts[1]["executed"] == 0
        _check_turn_metrics(log, counts)
        rewards = [value for record in _records(tmp_path, step) for value in record["rewards"]]
        assert log["reward"] == pytest.approx(sum(rewards) / len(rewards))


def _check_turn_metrics(log: dict[str, float], counts: list[dict[str, int]]) -> None:
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    assert log["tree/tool_calls"] == total["executed"]
    assert log["tree/calls_per_executed"] == pytest.approx(total["on_paths"] / total["executed"])
    assert log["tree/answer_tokens"] == total["answer_tokens"]
    assert log["tools/call_frequency"] == pytest.approx(total["on_paths"] / total["leaves"])


def _records(folder: Path, step: int) -> list[dict[str, Any]]:
    lines = (folder / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _recorded_trees(folder: Path, step: int) -> list[SegmentTree]:
    return [SegmentTree.from_dict(record["tree"]) for record in _records(folder, step)]


def test_sharded_training_is_that_of_whole_weights(tmp_path: Path, tiny_model_dir: str) -> None:
    """With FSDP2: the adapter that goes to the engine before each batch, the losses, and the trained adapter."""
    for rank in run_in_two_processes(SCRIPT, tmp_path, "train_sharded_and_write", tiny_model_dir, str(tmp_path)):
        assert rank["types"] == ["DTensor"]
        assert len(rank["difference"]) == 3  # two batches, and the end
        assert rank["moved"] > 1e-2
        assert max(rank["difference"]) < 1e-5
        whole, sharded = ([log for log in logs if "loss" in log] for logs in (rank["whole"], rank["logs"]))
        for key in ("loss", "grad_norm"):
            assert [log[key] for log in sharded] == pytest.approx([log[key] for log in whole], abs=1e-5), key
