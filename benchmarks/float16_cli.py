"""
`treepo-trl` where `fp16=True` works on a processor too, as on a card: autocast and the gradient scaler.

    python -m benchmarks.float16_cli quickstart --dtype float16 --bf16 false --fp16 true

A training refuses that: a processor without float16 arithmetic takes twenty times as long. Here it takes float16
numbers, multiplies them in float32 and rounds the result to float16, as a card does. So it is for comparing numbers,
not seconds. The scaler starts at 1024 in place of 65536, which short trainings lose steps to.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.support.half_precision import float16_on_cpu
from treepo_trl.cli import main


aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class InFloat32(TorchDispatchMode):
    """Products of float16 matrices, computed in float32 and rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for each operation."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.float16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
        result = func(*args, **kwargs)
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return result[0].half(), result[1]  # the second are sums of exponentials
        return tree_map_only(torch.Tensor, torch.Tensor.half, result)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched, InFloat32():
        float16_on_cpu(patched)
        main()
