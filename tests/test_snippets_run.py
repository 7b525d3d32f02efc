"""Python of README and docs runs, on tiny models; a snippet that does not has a reason."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.support.models import make_model
from tests.support.pages import BLOCKS, Block, Runner, blocks_of, name_of
from tests.support.paths import ROOT
from tests.support.trainers import SETTINGS, length_reward
from treepo_trl import TreePOConfig, TreePOTrainer


RUN_ELSEWHERE = {
    "docs/tutorial.md": "tests/test_tutorial.py",
    "docs/new-engine.md": "tests/engines/test_new_engine.py",
}
"""Pages whose snippets a test runs in order."""

WHY_NOT_RUN = {
    "needs the hub": r"\b[A-Z][\w-]+/[\w.-]*\d+(\.\d+)?[BMK]\b|trl-lib/|gsm8k|math500|\baime\b|git clone|openenv-core",
    "needs a card of its own": r"cli_configs/|gpu[-_]report|--card_gib",
    "needs a model, data or a run of the reader's": (
        r"\b(MODEL|RUN|NAME|FILE)\b|outputs/|\bmy[-_]|prompts\.jsonl|(recipe|config)\.yaml|=\.\.\."
    ),
    "takes minutes": r"-m benchmarks\.|make |quickstart|doctor",
    "needs a trainer": r"\btrainer\.",
    "installs, sets or shows": r"pip install|trackio|GenericEnvClient|docker|uv |^export |completion ",
}
"""Why a snippet does not run in a test, by what is in it. A page can also say so: `<!-- not run: reason -->`."""


ON_THE_HUB = {
    '"Qwen/Qwen2.5-0.5B-Instruct"': "model_folder",
    '"Qwen/Qwen2.5-1.5B-Instruct"': "model_folder",
    '"Qwen/Qwen3-0.6B"': "chat_folder",
    'load_dataset("trl-lib/DeepMath-103K", split="train")': "tasks",
}
SHORTER = {
    "TreePOConfig(output_dir": "TreePOConfig(**settings, output_dir",
    "max_completion_length=512": "max_completion_length=16",
    "reward_funcs=..., train_dataset=...": "reward_funcs=my_reward, args=args, train_dataset=tasks",
    "model=..., args=..., train_dataset=...": "model=chat_folder, args=args, train_dataset=counts",
}
RUN_HERE = [
    "README.md",
    "docs/health.md",
    "docs/logging.md",
    "docs/reliability.md",
    "docs/sample-without-training.md",
    "docs/start-from-an-adapter.md",
    "docs/tools-and-environments.md",
]
"""Pages whose Python runs below, each in one namespace, with what `names_for` says the reader has."""


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("sh", "python")], ids=lambda block: block.name)
def test_what_does_not_run_has_a_reason(block: Block) -> None:
    page = name_of(block.page)
    if page in RUN_ELSEWHERE or (page in RUN_HERE and block.language == "python") or block.why_not_run:
        return
    reasons = [reason for reason, pattern in WHY_NOT_RUN.items() if re.search(pattern, block.text)]
    assert reasons, f"{block.name} can run here: add it to a test, or `<!-- not run: reason -->` above it."


@pytest.fixture
def names(tiny_model_dir: str, chat_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader of any of these pages has: a model, tasks, a reward, a trainer, and files of earlier commands."""
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, "max_steps": 1, "max_completion_length": 8, "output_dir": "out", "save_strategy": "steps"}
    settings["per_device_train_batch_size"] = settings["num_generations"]  # a dataset of one row is enough
    tasks = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"w{i} w2"}] for i in range(8)], "solution": ["$1$"] * 8}
    )
    my_reward: Any = length_reward
    adapter = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    adapter.save_pretrained("outputs/sft")
    args = TreePOConfig(**settings)  # before the trainer, whose accelerator does not survive it
    trainer = TreePOTrainer(
        model=tiny_model_dir,
        reward_funcs=my_reward,
        args=TreePOConfig(**{**settings, "save_steps": 1, "disable_tqdm": False}),
        train_dataset=tasks,
    )
    return {
        **{name: getattr(importlib.import_module("treepo_trl"), name) for name in ("TreePOConfig", "TreePOTrainer")},
        "model_folder": tiny_model_dir,
        "chat_folder": chat_model_dir,
        "settings": {name: value for name, value in settings.items() if name != "output_dir"},
        "args": args,
        "tasks": tasks,
        "counts": tasks.add_column("start", list(range(8))),
        "my_reward": my_reward,
        "trainer": trainer,
    }


@pytest.mark.parametrize("page", RUN_HERE)
def test_python_of_a_page_runs(page: str, names: dict[str, Any]) -> None:
    runner = Runner({**ON_THE_HUB, **SHORTER})
    runner.names |= names
    if page == "docs/sample-without-training.md":  # its first snippet reads what the command above it writes
        Path("prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
        runner.shell(
            f"treepo-trl sample --model_name_or_path {names['model_folder']} --engine transformers "
            "--dataset_name prompts.jsonl --output trees.jsonl --num_generations 2 --max_completion_length 4"
        )
    if page == "docs/reliability.md":
        names["trainer"].train()
    blocks = [block for block in blocks_of(ROOT / page) if block.language == "python"]
    assert blocks
    for block in blocks:
        runner.run_block(block)
