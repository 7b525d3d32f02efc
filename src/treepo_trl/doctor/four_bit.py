"""Does a 4-bit layer of bitsandbytes compute here?"""

from typing import Any

import torch

from .findings import BrokenError
from .needs import Needs
from .number_type import training_device
from .versions import how_to_install


_LARGEST_ERROR = 0.02  # relative; rounding of 16-bit inputs


def check_four_bit(needs: Needs) -> str:
    """One NF4 layer: forward and backward as its weights, dequantized, give them."""
    try:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit
    except ImportError as error:
        raise BrokenError(f"bitsandbytes cannot be imported ({error}).", how_to_install("bitsandbytes")) from error
    device = training_device(needs)
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
    rows = torch.randn(8, 128, device=device, requires_grad=True)
    output = layer(rows)
    output.square().sum().backward()
    quantized: Any = layer.weight  # `Params4bit`, which has the scales
    weight = dequantize_4bit(quantized.data, quantized.quant_state).to(torch.float32)
    expected = rows.detach() @ weight.T
    assert rows.grad is not None, "a 4-bit layer hands gradients on"
    pairs = {"forward": (output.detach(), expected), "backward": (rows.grad, 2 * expected @ weight)}
    for name, (found, wanted) in pairs.items():
        error = ((found - wanted).norm() / wanted.norm()).item()
        if not error <= _LARGEST_ERROR:  # so that no number fails too
            raise BrokenError(
                f"The {name} pass of a 4-bit layer is off by {error:.2g}.",
                "Run `pip install --upgrade bitsandbytes`, or leave `load_in_4bit` out.",
            )
    return f"an NF4 layer of bitsandbytes computes forward and backward on {device.type}"
