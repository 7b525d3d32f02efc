"""accelerate's float16 on a processor: autocast and the gradient scaler, which it leaves out there without a word."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator


def float16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fp16=True` do on a processor what it does on a GPU, for trainers built from here on."""
    original = Accelerator.__init__

    def build(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            # From 65536 on the scaler comes down to this within its first steps, and leaves those out.
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=1024.0)

    monkeypatch.setattr(Accelerator, "__init__", build)
    monkeypatch.setattr("treepo_trl.settings.arguments.check_number_type", lambda args: None)
