"""The notebooks: valid, without outputs, and their cells run in order on a tiny model, by the cell of parameters."""

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from transformers import AutoTokenizer

from tests.support.models import save_random_smollm2
from tests.support.pages import Runner
from tests.support.paths import ROOT
from treepo_trl.quickstart import addition_tasks


NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))

ON_A_PROCESSOR = (
    "--use_cpu true --bf16 false --fp16 false --dtype float32 --use_vllm false --gradient_checkpointing false "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_generations 4 --max_completion_length 8 "
    "--segment_length 4 --save_strategy no --report_to none"
)
SHORT_EVALUATION = "--engine transformers --num_generations 1 --max_completion_length 4 --max_prompts 2"

PARAMETERS: dict[str, dict[str, Any]] = {
    "free-t4.ipynb": {
        "repository": str(ROOT),
        "model": "model",
        "steps": 1,
        "training": f"{ON_A_PROCESSOR} --dataset_name tasks.jsonl --reward_funcs treepo_trl.quickstart.answer_reward",
        "evaluation": f"{SHORT_EVALUATION} --dataset_name addition",
        "engine": "--dtype float32",
    },
    "lora-24gb.ipynb": {
        "repository": str(ROOT),
        "model": "model",
        "steps": 1,
        "num_tasks": 4,
        "num_held_out": 2,
        "training": ON_A_PROCESSOR,
        "evaluation": SHORT_EVALUATION,
    },
    "reading-a-tree.ipynb": {"model": "model", "num_prompts": 2},
}
"""What each notebook's cell of parameters says here: a tiny model on a processor."""

LEAVES = {
    "free-t4.ipynb": ["run/adapter_model.safetensors", "trees.html", "eval/results.json", "adapter.zip", "merged"],
    "lora-24gb.ipynb": ["run/adapter_model.safetensors", "trees.html", "eval/results.json", "merged"],
    "reading-a-tree.ipynb": ["trees.jsonl", "trees.html"],
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def test_every_notebook_runs_here() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(PARAMETERS) == sorted(LEAVES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_stripped(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert [cell.metadata.get("tags") for cell in code if cell.metadata] == [["parameters"]]
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert path.name == "reading-a-tree.ipynb" or "was not run on" in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_cells_of_a_notebook_run(
    path: Path, small_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "my_rewards", None)  # what a notebook writes is forgotten afterwards
    del sys.modules["my_rewards"]
    save_random_smollm2(AutoTokenizer.from_pretrained(small_model_dir), tmp_path / "model")
    addition_tasks(4, 2, seed=0)[0].to_json("tasks.jsonl")
    runner = Runner()
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            runner.python(cell.source, f"{path.name}, cell {number}")
        if cell.metadata.get("tags") == ["parameters"]:
            assert PARAMETERS[path.name].keys() <= runner.names.keys()
            runner.names |= PARAMETERS[path.name]
    assert [name for name in LEAVES[path.name] if not (tmp_path / name).exists()] == []
