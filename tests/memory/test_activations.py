"""Bytes of activations by hand, and against real tensors."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.models import make_model
from treepo_trl.memory.activations import STAND_IN, PeakBytes, activation_bytes, register_stand_in


def test_peak_of_a_chain_by_hand() -> None:
    known = torch.zeros(1000)  # 4000 bytes, not counted
    with PeakBytes([known]) as peak:
        a = known + 1  # 4000
        b = a + 1  # 8000
        del a  # 4000
        c = b + b  # 8000
        view = c.view(10, 100)  # shares the memory of c
        del b  # 4000
        d = torch.cat([c, view.flatten()])  # 12000
        del c, view, d
    assert peak.peak == 12000
    assert peak.live == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meta_device_counts_what_real_tensors_take(checkpointing: bool) -> None:
    """The same forward and backward pass with real tensors and real attention on the CPU."""
    register_stand_in()

    def build(device: str, attention: str) -> PeftModel:
        with torch.device(device):
            return get_peft_model(make_model(attn_implementation=attention), settings)

    settings = LoraConfig(r=4, target_modules="all-linear")
    counted = activation_bytes(build("meta", STAND_IN), 64, checkpointing)
    model = build("cpu", "sdpa")
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None] + list(model.buffers())
    with PeakBytes(tensors) as peak:
        ids = torch.zeros(1, 64, dtype=torch.long)
        hidden = model.get_base_model().get_decoder()(input_ids=ids, position_ids=ids, use_cache=False)
        hidden.last_hidden_state.float().sum().backward()
    assert counted == pytest.approx(peak.peak, rel=0.1)  # attention on CPU makes some copies of its own
