"""
In place of NCCL, which needs cards: what a group sends goes through the store where its processes meet.

The worker of a server imports this module (`TRANSFER_FLAGS`) before it builds its side of the transfer.
Everything else is vLLM's and TRL's own: endpoints, groups, the order of an update, how weights are loaded.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from trl.generation import vllm_client
from vllm.distributed.utils import StatelessProcessGroup  # noqa: TID253
from vllm.distributed.weight_transfer import nccl_engine  # noqa: TID253
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: TID253


class StoredGroup:
    """A group of the trainer, which has rank 0, and the workers of one server."""

    def __init__(self, info: Any, rank: int) -> None:
        self.group = StatelessProcessGroup.create(
            info["master_address"], info["master_port"], rank, info["world_size"]
        )

    def exchange(self, tensors: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """What rank 0 gives."""
        return self.group.broadcast_obj(tensors, src=0)

    def destroy(self) -> None:
        """It ends with its process."""


class _StoredTransfer(nccl_engine.NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        self.model_update_group: Any = StoredGroup(vars(init_info), init_info.rank_offset)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = self.parse_update_info(update_info)
        tensors = self.model_update_group.exchange(None)
        assert [list(tensor.shape) for tensor in tensors] == info.shapes
        assert [str(tensor.dtype) for tensor in tensors] == [f"torch.{name}" for name in info.dtype_names]
        self.model.load_weights(list(zip(info.names, tensors, strict=True)))


class WorkerExtension:
    """vLLM makes its worker a subclass of this."""


WeightTransferEngineFactory._registry["nccl"] = lambda: _StoredTransfer


def send_over_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's side, in this process."""

    def send(
        iterator: Iterator[tuple[str, torch.Tensor]], group: StoredGroup, src: int, post_iter_func: Callable[..., Any]
    ) -> None:
        group.exchange([post_iter_func(item) for item in iterator])

    original = vllm_client.VLLMClient.init_communicator
    monkeypatch.setattr(vllm_client, "open_trainer_endpoint", lambda info: StoredGroup(info, 0))
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", send)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, _: original(self, "cuda"))
