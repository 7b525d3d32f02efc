"""Two processes on one CPU: whole trees per process, and the same update as one process with both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.support.models import make_tokenizer
from tests.support.processes import run_in_two_processes
from treepo_trl import SegmentTree, TreePOConfig, TreePOTrainer


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "num_generations": 4,
    "max_completion_length": 9,
    "segment_length": 3,
    "scale_rewards": "batch",
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "log_trees": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "shuffle_dataset": False,
    "seed": 7,
}
# A long and a short prompt in turn: packing pays on the first process and not on the second.
PROMPTS = [" ".join(f"w{(i + j) % 60}" for j in range(1 if i % 2 else 40)) for i in range(8)]
SCRIPT = """
import json
import sys

import torch
from torch import distributed

from tests.trainer import test_distributed as here
from treepo_trl import TreePOTrainer, packed_forward

model, folder, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lora = changes.pop("lora", False)
changes |= {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
trainer = here.make_trainer(model, folder, TreePOTrainer, lora, **changes)
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
totals = []
sample = trainer.sampler.sample


def recording_sample(prompts, seed, **kwargs):
    trees = sample(prompts, seed, **kwargs)
    totals.append([sum(t.num_leaf_tokens for t in trees), sum(t.num_unique_tokens for t in trees), len(trees), seed])
    return trees


worth = []
is_worth_packing = packed_forward.is_worth_packing
packed_forward.is_worth_packing = lambda packed: (worth.append(is_worth_packing(packed)), worth[-1])[1]
trainer.sampler.sample = recording_sample
trainer.train()
result = {
    "totals": totals,
    "logs": trainer.state.log_history,
    "logged_advantages": list(trainer._logs["advantages"]),
    "worth": worth,
}
torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, f"{folder}/rank{rank}.pt")
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(result, file)
distributed.destroy_process_group()
"""


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(t % 2 == 0 for t in ids) / len(ids) + 0.01 * len(ids) for ids in completion_ids]


def make_trainer(model: str, folder: Any, cls: type, lora: bool, **changes: Any) -> Any:
    args = TreePOConfig(output_dir=str(folder), **{**SETTINGS, **changes})
    return cls(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )


class ReplayTrainer(TreePOTrainer):
    """One process with the trees that two have sampled."""

    recorded: list[list[SegmentTree]]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            trees = self.recorded.pop(0)
            self.sampler.sample = lambda prompts, seed, **_: trees
        return super()._generate_single_turn(*args, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 4,
            "branching_factor": 1,
            "temperature": 4.0,
        },
        {"lora": True, "beta": 0.1, "gradient_accumulation_steps": 2, "tree_packing": "sdpa"},
        # Prompts of different length: the processes cut their trees into different numbers of pieces.
        {"max_tokens_per_micro_batch": 60, "gradient_checkpointing": True},
    ],
    ids=["full", "lora", "pieces"],
)
def test_two_processes_update_as_one(tmp_path: Path, tiny_model_dir: str, changes: dict[str, Any]) -> None:
    accumulation = changes.get("gradient_accumulation_steps", 1)
    ranks = run_in_two_processes(SCRIPT, tmp_path, tiny_model_dir, str(tmp_path), json.dumps(changes))

    if "eval_strategy" in changes:
        # Without branching only the long prompt's rows share enough: one process packs, the other one does not.
        assert [rank["worth"][0] for rank in ranks] == [True, False]

    # Both processes hold the same model, and it has moved.
    parameters = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert parameters[0].keys() == parameters[1].keys()
    for name in parameters[0]:
        assert torch.equal(parameters[0][name], parameters[1][name]), name

    # Whole trees on each process, with seeds of their own; the metrics are totals over both.
    logs = [log for log in ranks[0]["logs"] if "loss" in log]
    assert len(logs) == len(ranks[0]["totals"]) == len(ranks[1]["totals"]) == 2
    for log, first, second in zip(logs, ranks[0]["totals"], ranks[1]["totals"], strict=True):
        assert first[2] == second[2] == accumulation
        assert first[3] != second[3]
        assert log["tree/leaf_tokens"] == first[0] + second[0]
        assert log["tree/unique_tokens"] == log["tree/decoded_tokens"] == first[1] + second[1]
        assert log["tree/leaf_unique_ratio"] == pytest.approx((first[0] + second[0]) / (first[1] + second[1]))
        assert sum(log[f"tree/finish_{r}_frac"] for r in ("stop", "pattern", "repetition", "length")) == pytest.approx(
            1
        )

    # The tree log has the trees of both.
    recorded = []
    for step in range(2):
        lines = (tmp_path / f"trees/trees_{step:06d}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["prompt"] for record in records] == PROMPTS[2 * accumulation * step :][: 2 * accumulation]
        recorded.append([SegmentTree.from_dict(record["tree"]) for record in records])
        for record, tree in zip(records, recorded[-1], strict=True):
            assert record["rewards"] == pytest.approx(
                reward([tree.completion_ids(leaf) for leaf in record["rows"]]), abs=1e-5
            )
    logged = [value for record in records for value in record["advantages"]]
    if "eval_strategy" not in changes:  # an evaluation puts its own there
        assert ranks[0]["logged_advantages"][-8:] == pytest.approx(logged[-8:], abs=1e-4)
    else:
        assert sum("eval_reward" in log for log in ranks[0]["logs"]) == 2

    # One process with all of these trees makes the same steps.
    lora = changes.pop("lora", False)
    changes = {k: v for k, v in changes.items() if "eval" not in k}
    single = make_trainer(
        tiny_model_dir, tmp_path / "single", ReplayTrainer, lora, per_device_train_batch_size=8, **changes
    )
    single.recorded = list(recorded)
    before = {n: p.detach().clone() for n, p in single.model.named_parameters()}
    single.train()
    worst = max((p.detach() - parameters[0][n]).abs().max().item() for n, p in single.model.named_parameters())
    moved = max((p.detach() - before[n]).abs().max().item() for n, p in single.model.named_parameters())
    assert moved > 1e-2
    assert worst < 1e-4
    for key in ("grad_norm", "reward", "reward_std"):
        values = [log[key] for log in single.state.log_history if key in log]
        assert [log[key] for log in logs] == pytest.approx(values, abs=1e-4)
