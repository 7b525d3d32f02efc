"""In place of NCCL, which needs cards: what TRL's client sends over it, and fake servers that take it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.policy_fake import LORA, PolicyFake, opened
from treepo_trl.policy.servers.policy_servers import PolicyServers
from treepo_trl.policy.servers.sent_weights import SentWeights
from treepo_trl.policy.servers.weights import WeightVersions


NCCL: dict[str, dict[str, Any]] = {**LORA, "weight_transfer_config": {"backend": "nccl"}}


class Transfers:
    """Stands in for NCCL in TRL's client, whose requests and threads are its own."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[str]]] = []  # port of the group, and names
        self.groups: list[SimpleNamespace] = []
        self.while_opening: Callable[[], None] = lambda: None
        self.while_sending: Callable[[], None] = lambda: None

    def open(self, info: dict[str, Any]) -> SimpleNamespace:
        self.while_opening()
        group = SimpleNamespace(group=SimpleNamespace(), port=info["master_port"], destroyed=False)
        group.destroy = lambda: setattr(group, "destroyed", True)
        self.groups.append(group)
        return group

    def send(self, iterator: Iterator[tuple[str, torch.Tensor]], group: Any, src: int, post_iter_func: Any) -> None:
        assert src == 0
        self.while_sending()
        self.sent.append((group.port, [name for name, _ in iterator]))


def opened_nccl(stack: ExitStack, folder: Path, count: int = 1) -> tuple[PolicyServers, list[PolicyFake]]:
    """As `ServerGeneration` opens them."""
    servers, fakes = opened(stack, folder, count, versions=WeightVersions, changes=NCCL)
    assert servers.takes_sent_weights
    servers.versions = versions = SentWeights(str(folder), "run", torch.device("cpu"), 51000, servers.check_again)
    versions.connect(servers.servers)
    for fake in fakes:
        assert fake.calls == ["/init_weight_transfer_engine", "/update_weight_version"]
        fake.calls.clear()
    return servers, fakes
