"""The comparison of an engine with its model: how much rounding explains, by what the model computes in."""

from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32

from tests.support.families import FAMILY
from treepo_trl.engines import SegmentRequest, SegmentResult
from treepo_trl.engines.for_model import engine_for_model
from treepo_trl.engines.own_model import _is_exact, compare_with_plain_forward


PATH = [5, 6, 7, 8]


def in_mixed_precision() -> Any:
    """A model with weights in float32 as Accelerate prepares it for `bf16: true`."""
    model: Any = FAMILY["Llama"].model()
    computed = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(convert_outputs_to_fp32(computed), model)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PATH])).logits[0, -1]


def test_mixed_precision_rounds_more_than_float32() -> None:
    model, exact = in_mixed_precision(), FAMILY["Llama"].model()
    logits = logits_of(exact)
    assert logits_of(model).dtype == torch.float32
    compare_with_plain_forward(model, PATH, logits)
    with pytest.raises(RuntimeError, match=r"where rounding explains 0\.3\."):
        compare_with_plain_forward(model, PATH, logits.flip(0))
    with pytest.raises(RuntimeError, match=r"rounding in float32 explains 0\.001\."):
        compare_with_plain_forward(exact, PATH, logits_of(model))


@pytest.mark.parametrize("family", ["Llama", "Bamba"])  # an engine of each kind
def test_engines_sample_in_mixed_precision(family: str) -> None:
    model = FAMILY[family].model()
    with torch.autocast("cpu", torch.bfloat16):
        engine = engine_for_model(model, [99])
        engine.submit([SegmentRequest(0, PATH, 4)])
        results: list[SegmentResult] = []
        while not results:
            results = engine.collect()
    assert len(results[0].token_ids) == 4


@pytest.mark.parametrize(
    ("types", "device", "precision", "is_exact"),
    [
        ({torch.float32}, "cpu", "highest", True),
        ({torch.float32}, "cpu", "high", True),
        ({torch.float32}, "cuda", "highest", True),
        ({torch.float32}, "cuda", "high", False),  # TF32
        ({torch.float32}, "mps", "highest", False),
        ({torch.float32, torch.bfloat16}, "cpu", "highest", False),
        ({torch.uint8, torch.float32}, "cuda", "highest", False),
    ],
)
def test_what_computes_in_float32(
    types: set[torch.dtype], device: str, precision: str, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert _is_exact(types, device) == is_exact
