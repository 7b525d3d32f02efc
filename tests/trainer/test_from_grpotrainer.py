"""Both sides of the block in docs/from-grpotrainer.md train, with a tiny model in place of the one that it names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.paths import ROOT


DIFF = re.search(r"^```diff\n(.*?)^```", (ROOT / "docs/from-grpotrainer.md").read_text(encoding="utf-8"), re.M | re.S)


def side(diff: str, sign: str) -> str:
    """The script that has the lines of this sign, and those without one."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


@pytest.mark.parametrize(("sign", "trainer"), [("-", "GRPOTrainer"), ("+", "TreePOTrainer")])
def test_the_script_trains(sign: str, trainer: str, tmp_path: Path, tiny_model_dir: str) -> None:
    assert DIFF is not None
    script = side(DIFF[1], sign)
    for name, here in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(tiny_model_dir)),
        ('"outputs/trees"', repr(str(tmp_path))),
        ("max_steps=2,", 'max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",'),
    ):
        assert script.count(name) == 1
        script = script.replace(name, here)
    names: dict[str, Any] = {}
    exec(script, names)
    assert type(names["trainer"]).__name__ == trainer
    assert names["trainer"].state.global_step == 2
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    after = names["trainer"].model.state_dict()
    assert any(not torch.equal(before[key], after[key].to(before[key].dtype)) for key in before)


def test_only_the_names_differ() -> None:
    assert DIFF is not None
    old, new = (side(DIFF[1], sign).splitlines() for sign in "-+")
    assert [a for a in old if a not in new] == [
        "from trl import GRPOConfig, GRPOTrainer",
        "config = GRPOConfig(",
        "trainer = GRPOTrainer(",
    ]
    assert len(old) == len(new)
