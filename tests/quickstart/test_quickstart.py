"""The main job as a user runs it, cut to two steps."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.paths import ROOT
from treepo_trl import SegmentTree
from treepo_trl.health import logs_of_run


def test_quickstart_leaves_a_result_an_adapter_and_trees(small_model_dir: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "treepo_trl.cli", "quickstart"),
        *("--model_folder", small_model_dir, "--output_dir", str(tmp_path), "--max_steps", "2"),
        *("--num_held_out", "8", "--per_device_train_batch_size", "16"),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "accuracy on 8 held-out tasks before training" in run.stdout
    assert "accuracy on 8 held-out tasks after training" in run.stdout
    assert "step 2/2  reward" in run.stdout + run.stderr

    result = json.loads((tmp_path / "quickstart.json").read_text())
    assert len(result["steps"]) == 2
    assert logs_of_run(str(tmp_path)).sources == ["trainer_state.json up to step 2"]
    assert 0 <= result["accuracy_after"] <= 1

    model = AutoModelForCausalLM.from_pretrained(small_model_dir)
    adapted = PeftModel.from_pretrained(model, tmp_path)
    moved = [p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name]
    assert moved  # lora_B starts at zero, so what is loaded has been trained
    assert torch.stack(moved).all()

    lines = [json.loads(line) for file in sorted((tmp_path / "trees").iterdir()) for line in file.open()]
    assert [line["step"] for line in lines] == [0, 0, 1, 1]  # two trees a step
    for line in lines:
        tree = SegmentTree.from_dict(line["tree"])
        assert len(tree.leaves) == len(line["rewards"]) == len(line["advantages"]) == 8
        assert set(line["rewards"]) <= {0.0, 1.0}
