"""All weights without folders: the order for several servers, and what becomes of one that is started anew or dies."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.generation.vllm_client import VLLMClient

from tests.support.fake_vllm import until
from tests.support.policy_fake import LORA, PolicyFake, engine_over, opened, sample
from treepo_trl.engines.server_connection import ServerConnection
from treepo_trl.policy.servers import sent_weights
from treepo_trl.policy.servers.policy_servers import PolicyServers
from treepo_trl.policy.servers.sent_weights import SentWeights, _Client, _pieces, can_send


pytestmark = pytest.mark.usefixtures("lost_servers_are_asked_often")
NCCL: dict[str, dict[str, Any]] = {**LORA, "weight_transfer_config": {"backend": "nccl"}}
WEIGHTS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3)), ("c", torch.zeros(8, dtype=torch.bfloat16))]
ORDER = ["/pause", "/start_weight_update", "/finish_weight_update", "/update_weight_version", "/resume"]


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Port of the group and names of each piece that was sent; nothing travels."""
    sent: list[tuple[int, list[str]]] = []

    def note(client: VLLMClient, metadata: list[Any], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert [(name, str(t.dtype), list(t.shape)) for name, t in weights] == [
            (name, f"torch.{dtype}", shape) for name, dtype, shape in metadata
        ]
        sent.append((client.group_port, [name for name, *_ in metadata]))

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", note)
    return sent


def opened_nccl(stack: ExitStack, folder: Path, count: int = 1) -> tuple[PolicyServers, list[PolicyFake]]:
    versions = partial(SentWeights, device=torch.device("cpu"), group_port=51000)
    servers, fakes = opened(stack, folder, count, versions=versions, changes=NCCL)
    assert servers.takes_sent_weights
    return servers, fakes


def give(servers: PolicyServers, step: int) -> None:
    servers.take_weights(step, iter(WEIGHTS))
    servers.distribute()


def test_each_piece_goes_to_all_servers_before_the_next(
    stack: ExitStack, tmp_path: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_weights, "_BYTES_PER_PIECE", 40)  # 24 of a and 24 of b, then 16 of c
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    for step in range(2):
        give(servers, step)
        assert sent == [(51000, ["a", "b"]), (51001, ["a", "b"]), (51000, ["c"]), (51001, ["c"])]
        sent.clear()
        for fake in fakes:
            assert fake.calls == ORDER
            assert fake.weights == f"treepo-run-{step}"
            fake.calls.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_started_anew_waits_for_the_next_update(
    stack: ExitStack, tmp_path: Path, sent: list[Any]
) -> None:
    """It gets a group of its own then, and is checked before it samples."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    sample(engine, servers)
    fakes[0].forget()
    fakes[0].served.clear()
    sample(engine, servers)
    assert [server.url for server in engine.living_servers()] == [fakes[1].url]
    assert fakes[0].served == set()
    sent.clear()
    give(servers, 1)
    assert sent == [(51002, ["a", "b", "c"]), (51001, ["a", "b", "c"])]
    until(lambda: len(engine.living_servers()) == 2)
    sample(engine, servers)
    assert fakes[0].served == {"treepo-run-1"}


def test_a_restart_that_nobody_has_seen_is_checked_too(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].forget()
    fakes[0].changes = {**NCCL, "model_config": {"model": "/models/other"}}
    give(servers, 1)
    sample(engine, servers)
    assert fakes[0].served == set()
    until(lambda: "serves '/models/other'" in engine._pool.servers[0].error)


def test_a_server_without_the_flag_stays_out(stack: ExitStack, tmp_path: Path, sent: list[Any]) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].forget()
    fakes[0].changes = LORA
    sample(engine, servers)
    sent.clear()
    give(servers, 1)
    assert [port for port, _ in sent] == [51001]
    sample(engine, servers)
    assert fakes[0].served == set()


def test_a_server_that_is_gone_is_left_out(stack: ExitStack, tmp_path: Path, sent: list[Any]) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].die()
    sent.clear()
    give(servers, 1)
    assert [port for port, _ in sent] == [51001]
    sample(engine, servers)
    assert fakes[1].served == {"treepo-run-1"}


@pytest.mark.parametrize("name", ["init_communicator", "update_named_params"])
def test_who_waits_for_a_server_that_has_died_gives_up(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As NCCL does, the sender would wait for ever."""
    servers, fakes = opened_nccl(stack, tmp_path)
    released = threading.Event()
    stack.callback(released.set)

    def hang(*args: Any) -> None:
        fakes[0].die()
        released.wait(60)

    monkeypatch.setattr(VLLMClient, name, hang)
    monkeypatch.setattr(sent_weights, "_LOOK", 0.05)
    with pytest.raises(RuntimeError, match=rf"{fakes[0].url} did not take .* not answer\. Start all servers"):
        give(servers, 0)


def test_a_slow_server_is_waited_for(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, fakes = opened_nccl(stack, tmp_path)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda *args: until(lambda: fakes[0].num_health > 5))
    monkeypatch.setattr(sent_weights, "_LOOK", 0.05)
    give(servers, 0)
    assert fakes[0].weights == "treepo-run-0"


def test_what_trl_reports_is_passed_on(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("NCCL error: Duplicate GPU detected.")

    servers, _ = opened_nccl(stack, tmp_path)
    monkeypatch.setattr(VLLMClient, "init_communicator", fail)
    with pytest.raises(RuntimeError, match=r"Duplicate GPU detected\..* cards that no other process"):
        give(servers, 0)


def test_trls_client_sends_user_and_password_and_shows_neither(stack: ExitStack) -> None:
    fake = stack.enter_context(PolicyFake())
    client = _Client(ServerConnection(fake.url.replace("http://", "http://me:secret@")), 51000)
    assert client.base_url == fake.url
    assert client.session.headers["Authorization"] == "Basic bWU6c2VjcmV0"
    assert not client.session.trust_env


def test_pieces_are_copies() -> None:
    """The next step of a gathering may put something else into the same memory."""
    memory = torch.zeros(3)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            yield str(i), memory.fill_(i)

    (piece,) = _pieces(gathered(), torch.device("cpu"))
    assert [(name, tensor.tolist()) for name, tensor in piece] == [(str(i), [i] * 3) for i in range(3)]


def test_nccl_needs_a_card() -> None:
    assert can_send(torch.device("cuda", 1))
    assert not can_send(torch.device("cpu"))
