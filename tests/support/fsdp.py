"""Accelerate's FSDP2 on processors, which it starts on accelerators alone."""

from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def start_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerators that are made from now on share the weights of a model, as with a card for each process."""
    AcceleratorState._reset_state()
    initialize = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        is_first = not AcceleratorState._shared_state
        initialize(self, *args, **kwargs)
        if is_first:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                reshard_after_forward=True,
            )

    monkeypatch.setattr(AcceleratorState, "__init__", with_fsdp)
