"""Both sides of the block in docs/from-grpotrainer.md train, with a tiny model in place of the one that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from tests.support.paths import ROOT


BLOCK = re.compile(r"^```diff\n(.*?)^```", re.MULTILINE | re.DOTALL)


def side(sign: str) -> str:
    """The script that has the lines of this sign, and those without one."""
    found = BLOCK.search((ROOT / "docs" / "from-grpotrainer.md").read_text(encoding="utf-8"))
    assert found is not None
    return "\n".join(line[1:] for line in found[1].splitlines() if line[:1] in ("", " ", sign))


def trained(sign: str, model: str, folder: Path, settings: str, train: str = "trainer.train()") -> Trainer:
    script = side(sign)
    for name, here in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(model)),
        ('"outputs/trees"', repr(str(folder))),
        ("max_steps=2,", f"use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, {settings},"),
        ("trainer.train()", train),
    ):
        assert script.count(name) == 1
        script = script.replace(name, here)
    names: dict[str, Any] = {}
    exec(script, names)
    return names["trainer"]


def assert_has_learned(trainer: Trainer, model: str) -> None:
    assert isinstance(trainer.model, torch.nn.Module)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[key], after[key].to(before[key].dtype)) for key in before)


@pytest.mark.filterwarnings("ignore")
def test_both_sides_train_and_trees_go_on_from_a_checkpoint_of_grpotrainer(
    tmp_path: Path, tiny_model_dir: str
) -> None:
    stock = trained("-", tiny_model_dir, tmp_path / "run", 'max_steps=2, save_strategy="steps", save_steps=2')
    trees = trained("+", tiny_model_dir, tmp_path / "other", 'max_steps=2, save_strategy="no"')
    for trainer, name in ((stock, "GRPOTrainer"), (trees, "TreePOTrainer")):
        assert type(trainer).__name__ == name
        assert trainer.state.global_step == 2
        assert_has_learned(trainer, tiny_model_dir)
    resumed = 'max_steps=3, save_strategy="no"'
    later = trained("+", tiny_model_dir, tmp_path / "run", resumed, "trainer.train(resume_from_checkpoint=True)")
    rewards = [[log["reward"] for log in trainer.state.log_history if "reward" in log] for trainer in (stock, later)]
    assert later.state.global_step == 3
    assert rewards[1][:2] == rewards[0]
