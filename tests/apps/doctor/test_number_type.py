"""Number types and 4-bit layers: which to set here, and what is said where one is refused."""

from pathlib import Path

import pytest
import torch

from tests.support.broken_environments import hide
from tests.support.recipes import everything, recipe_of, written
from treepo_trl.apps.doctor.checks import check_number_type
from treepo_trl.apps.doctor.findings import BrokenError
from treepo_trl.apps.doctor.step import check_four_bit


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card")


def test_which_type_to_set(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = everything(tiny_model_dir)
    assert check_number_type(recipe) == "set `bf16: true`, with `use_cpu: true` on a processor"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert check_number_type(recipe) == "set `fp16: true, bf16: false`"


@pytest.mark.parametrize(
    ("settings", "cause", "remedy"),
    [
        # transformers refuses it here, as it does on a card below compute capability 8.0.
        ({}, "bfloat16 is refused here: Your setup doesn't support bf16/gpu", "`use_cpu: true` and `bf16: false`"),
        # A training refuses it: accelerate would compute in float32.
        (
            {"fp16": True, "use_cpu": True},
            "float16 is refused here: `fp16=True` needs a GPU",
            "`use_cpu: true`, `fp16: false` and `bf16: false`",
        ),
    ],
)
def test_a_type_that_is_refused(
    settings: dict[str, bool], cause: str, remedy: str, tiny_model_dir: str, tmp_path: Path
) -> None:
    with pytest.raises(BrokenError, match=cause) as error:
        check_number_type(recipe_of(written(tmp_path, **settings), tiny_model_dir))
    assert remedy in error.value.remedy
    taken = recipe_of(written(tmp_path, use_cpu=True), tiny_model_dir)
    assert check_number_type(taken) == "bfloat16 is taken on cpu"


def test_a_4_bit_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert "forward and backward on cpu" in check_four_bit(device)
    from bitsandbytes import functional

    weights = functional.dequantize_4bit
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dequantize_4bit", lambda *given: 1.1 * weights(*given))
        with pytest.raises(BrokenError, match=r"pass of a 4-bit layer is off by 0\.09"):
            check_four_bit(device)
    hide(monkeypatch, "bitsandbytes", "bitsandbytes")
    with pytest.raises(BrokenError, match="No module named 'bitsandbytes") as error:
        check_four_bit(device)
    assert error.value.remedy == 'Run `pip install "treepo-trl[quantization]"`.'
