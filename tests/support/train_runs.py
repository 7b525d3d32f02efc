"""Trainings by the command: their flags, and what is in a user's working folder, which conftest.py makes."""

import json
from pathlib import Path
from typing import Any

from tests.support.sample_runs import as_flags


REWARDS = """
calls = []


def even(completion_ids, **kwargs):
    calls.append(len(completion_ids))
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def short(completions, answer, **kwargs):
    return [-float(len(c)) for c in completions]
"""
FLAGS: dict[str, Any] = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "learning_rate": 0.1, "optim": "sgd"},
    **{"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "segment_length": 4},
    **{"logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "dtype": "float32"},
    **{"disable_tqdm": True, "output_dir": "out"},
}


def write_files(folder: Path) -> None:
    """A dataset of prompts with answers, and the module `my_rewards`."""
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": str(i)} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)


def settings(model: str | None, **changes: Any) -> dict[str, Any]:
    """Settings of a training, as they stand in a config file."""
    files = {"dataset_name": "data.jsonl", "reward_funcs": ["my_rewards.even"]}
    return {"model_name_or_path": model, **files, **FLAGS, **changes}


def arguments(model: str | None, **changes: Any) -> list[str]:
    return as_flags(settings(model, **changes))
