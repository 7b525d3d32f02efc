"""All weights without folders: the order for several servers, and what becomes of one that fails or is new."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient

from tests.support.fake_vllm import until
from tests.support.nccl_fake import NCCL, Transfers, opened_nccl
from tests.support.policy_fake import LORA, PolicyFake, engine_over, sample
from treepo_trl.engines.server_connection import ServerConnection, ServerLostError
from treepo_trl.policy.servers import sent_weights
from treepo_trl.policy.servers.policy_servers import PolicyServers
from treepo_trl.policy.servers.sent_weights import SentWeights, TransferError, _Client, _pieces, can_send


free_port = sent_weights._free_port  # the tests below replace it
pytestmark = [pytest.mark.usefixtures("lost_servers_are_asked_often"), pytest.mark.needs_vllm]
WEIGHTS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3)), ("c", torch.zeros(8, dtype=torch.bfloat16))]
PAUSED, ENDED = ["/pause", "/start_weight_update"], ["/finish_weight_update", "/update_weight_version", "/resume"]


@pytest.fixture(autouse=True)
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    transfers, original = Transfers(), VLLMClient.init_communicator
    monkeypatch.setattr(vllm_client, "open_trainer_endpoint", transfers.open)
    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", transfers.send)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, _: original(self, "cuda"))
    monkeypatch.setattr(sent_weights, "_LOOK", 0.05)
    monkeypatch.setattr(sent_weights, "_free_port", lambda first: first)
    return transfers


def give(servers: PolicyServers, step: int) -> None:
    servers.take_weights(step, iter(WEIGHTS))
    servers.distribute()


def test_each_piece_goes_to_all_servers_before_the_next(
    stack: ExitStack, tmp_path: Path, transfers: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent_weights, "_BYTES_PER_PIECE", 50)  # 24 of a and 24 of b, then 16 of c
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    for step in range(2):
        give(servers, step)
        assert transfers.sent == [(51000, ["a", "b"]), (51001, ["a", "b"]), (51000, ["c"]), (51001, ["c"])]
        transfers.sent.clear()
        for fake in fakes:
            assert fake.calls == [*PAUSED, "/update_weights", "/update_weights", *ENDED]
            assert fake.weights == f"treepo-run-{step}"
            fake.calls.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_started_anew_waits_for_the_next_update(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
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
    transfers.sent.clear()
    give(servers, 1)
    assert transfers.sent == [(51002, ["a", "b", "c"]), (51001, ["a", "b", "c"])]
    assert [group.destroyed for group in transfers.groups] == [True, False, False]
    until(lambda: len(engine.living_servers()) == 2)
    sample(engine, servers)
    assert fakes[0].served == {"treepo-run-1"}


def test_a_server_that_is_started_anew_before_the_first_batch_gets_a_group(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    fakes[0].forget()
    give(servers, 0)
    assert transfers.sent == [(51002, ["a", "b", "c"]), (51001, ["a", "b", "c"])]
    assert [group.destroyed for group in transfers.groups] == [True, False, False]
    sample(engine_over(stack, servers), servers)
    assert [fake.served for fake in fakes] == [{"treepo-run-0"}] * 2


def test_another_server_before_the_first_batch_is_an_error(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened_nccl(stack, tmp_path)
    fakes[0].forget()
    fakes[0].changes = {**NCCL, "model_config": {"model": "/models/other"}}
    with pytest.raises(ValueError, match="serves '/models/other'"):
        give(servers, 0)
    assert fakes[0].calls == []


def test_a_group_alone_is_no_policy(stack: ExitStack, tmp_path: Path, transfers: Transfers) -> None:
    """A new one lives on where the update fails after its opening."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    fakes[0].forget()
    fakes[0].fails = {"/start_weight_update"}
    give(servers, 1)
    with pytest.raises(ServerLostError, match="has missed the last one"):
        servers.versions.load(servers.servers[0])
    fakes[0].fails = set()
    give(servers, 2)
    servers.versions.load(servers.servers[0])
    assert len(transfers.groups) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [({**NCCL, "model_config": {"model": "/models/other"}}, "serves '/models/other'"), (LORA, "weight transfer")],
)
def test_nothing_is_sent_to_another_server_than_before(
    stack: ExitStack, tmp_path: Path, transfers: Transfers, changes: Any, said: str
) -> None:
    """Also if nobody has seen that it was started anew."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].forget()
    fakes[0].changes = changes
    fakes[0].calls.clear()
    transfers.sent.clear()
    give(servers, 1)
    assert [port for port, _ in transfers.sent] == [51001]
    assert fakes[0].calls == []
    sample(engine, servers)
    assert fakes[0].served == set()
    assert said in str(servers.versions.take(2, iter(WEIGHTS), servers.servers)[servers.servers[0]])


def test_a_server_that_is_gone_is_left_out(stack: ExitStack, tmp_path: Path, transfers: Transfers) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].die()
    transfers.sent.clear()
    give(servers, 1)
    assert [port for port, _ in transfers.sent] == [51001]
    sample(engine, servers)
    assert fakes[1].served == {"treepo-run-1"}


def test_a_restart_that_nobody_has_seen_is_probed_before_it_samples(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].forget()
    fakes[0].offset = 0.2  # it computes another model
    give(servers, 1)
    sample(engine, servers)
    assert fakes[0].weights == "treepo-run-1"
    assert fakes[0].served == set()
    until(lambda: "computes another model" in engine._pool.servers[0].error)


@pytest.mark.parametrize("path", ["/start_weight_update", "/finish_weight_update"])
def test_what_a_server_cannot_do_from_the_start_is_an_error(stack: ExitStack, tmp_path: Path, path: str) -> None:
    """And it leaves the others as a training finds them."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    fakes[1].fails = {path}
    with pytest.raises(ServerLostError, match=f"{path} has failed"):
        give(servers, 0)
    assert fakes[0].calls[-2:] == ["/finish_weight_update", "/resume"]


def test_an_update_that_a_killed_training_has_begun_is_ended(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened_nccl(stack, tmp_path)
    fakes[0].is_updating = True
    give(servers, 0)
    assert fakes[0].weights == "treepo-run-0"


@pytest.mark.parametrize("path", ["/start_weight_update", "/finish_weight_update", "/update_weight_version"])
def test_a_server_that_fails_before_or_after_is_lost_and_not_left_paused(
    stack: ExitStack, tmp_path: Path, transfers: Transfers, path: str
) -> None:
    """Its group lives, so the next update goes over it."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].fails = {path}
    give(servers, 1)
    assert fakes[0].calls[-1] == "/resume"
    sample(engine, servers)
    assert "treepo-run-1" not in fakes[0].served
    assert fakes[1].served == {"treepo-run-1"}
    fakes[0].fails = set()
    give(servers, 2)
    assert len(transfers.groups) == 2
    until(lambda: len(engine.living_servers()) == 2)


def test_a_group_that_does_not_open_later_costs_one_server(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    fakes[0].forget()
    fakes[0].fails = {"/init_weight_transfer_engine"}
    transfers.sent.clear()
    give(servers, 1)
    assert [port for port, _ in transfers.sent] == [51001]


def test_a_group_that_does_not_open_is_tried_less_and_less(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    """Each try may hold all others. Once it has opened, that is forgotten."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    give(servers, 0)
    tried: list[int] = []
    for step in range(1, 60):
        fakes[0].calls.clear()
        if step in (1, 8):
            fakes[0].forget()
        fakes[0].fails = set() if step == 7 else {"/init_weight_transfer_engine"}
        lost = servers.versions.take(step, iter(WEIGHTS), servers.servers)
        if "/init_weight_transfer_engine" in fakes[0].calls:
            tried.append(step)
        if step == 4:
            assert "left out of this update: one in 4 tries it" in str(lost[servers.servers[0]])
    assert tried == [1, 3, 7, 8, 10, 14, 22, 38, 54]  # one in 16 at least


def test_a_group_that_does_not_open_at_the_start_is_an_error(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    def fail() -> None:
        raise RuntimeError("NCCL error: invalid usage.")

    transfers.while_opening = fail
    with pytest.raises(TransferError, match=r"over NCCL: NCCL error: invalid usage\. Each process needs a card"):
        opened_nccl(stack, tmp_path)


@pytest.mark.parametrize("hangs", ["while_opening", "while_sending"])
def test_who_waits_for_a_server_that_has_died_gives_up(
    stack: ExitStack, tmp_path: Path, transfers: Transfers, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without power: no connection closes, and as NCCL does, this side would wait for ever."""
    released = threading.Event()
    stack.callback(released.set)
    servers, fakes = opened_nccl(stack, tmp_path)

    def hang() -> None:
        monkeypatch.setattr(ServerConnection, "is_healthy", lambda self: False)
        released.wait(60)

    setattr(transfers, hangs, hang)
    fakes[0].hangs = {"/init_weight_transfer_engine", "/update_weights"}
    again = SentWeights(str(tmp_path), "run", torch.device("cpu"), 51000, lambda _: None)
    work = {"while_opening": lambda: again.connect(servers.servers), "while_sending": lambda: give(servers, 0)}
    with pytest.raises(TransferError, match=rf"{fakes[0].url} over NCCL: it does not answer\. "):
        work[hangs]()
    assert [group.destroyed for group in transfers.groups] == [hangs == "while_sending"]


def test_a_refusal_is_heard_while_this_side_still_waits(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    """It is sent once, and the other servers are left as a training finds them."""
    released = threading.Event()
    stack.callback(released.set)
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    fakes[1].fails = {"/update_weights"}

    def hang_for_the_second() -> None:
        if "/update_weights" in fakes[1].calls:
            released.wait(60)

    transfers.while_sending = hang_for_the_second
    with pytest.raises(TransferError, match=r"with status 500: /update_weights has failed\. Each"):
        give(servers, 0)
    assert fakes[1].calls.count("/update_weights") == 1
    assert fakes[0].calls == [*PAUSED, "/update_weights", "/finish_weight_update", "/resume"]


def test_an_error_of_this_side_is_told_while_the_server_waits(
    stack: ExitStack, tmp_path: Path, transfers: Transfers
) -> None:
    """The group ends, the request is taken back, and no server is left paused."""
    servers, fakes = opened_nccl(stack, tmp_path, 2)
    fakes[0].hangs = {"/update_weights"}

    def fail() -> None:
        until(lambda: fakes[0].hanging)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    transfers.while_sending = fail
    with ThreadPoolExecutor(1) as thread:
        given = thread.submit(give, servers, 0)
        try:
            until(given.done)
            until(lambda: not fakes[0].hanging)
        finally:
            fakes[0].hangs = set()
    with pytest.raises(TransferError, match=rf"{fakes[0].url} over NCCL: CUDA out of memory\. Each") as error:
        given.result()
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert [group.destroyed for group in transfers.groups] == [True, False]
    for fake in fakes:
        assert fake.calls == [*PAUSED, "/finish_weight_update", "/resume"]


def test_an_error_of_the_gathering_leaves_no_server_paused(stack: ExitStack, tmp_path: Path) -> None:
    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        yield WEIGHTS[0]
        raise MemoryError

    servers, fakes = opened_nccl(stack, tmp_path, 2)
    with pytest.raises(MemoryError):
        servers.take_weights(0, gathered())
    for fake in fakes:
        assert fake.calls == [*PAUSED, "/finish_weight_update", "/resume"]


def test_a_slow_server_is_waited_for(
    stack: ExitStack, tmp_path: Path, transfers: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it misses a look or two, as a busy machine does."""
    servers, fakes = opened_nccl(stack, tmp_path)
    looks = iter([False, False, True, False, False, True, True])
    healthy: list[bool] = []

    def look(server: ServerConnection) -> bool:
        healthy.append(next(looks, True))
        return healthy[-1]

    monkeypatch.setattr(ServerConnection, "is_healthy", look)
    transfers.while_sending = lambda: until(lambda: len(healthy) > 6)
    give(servers, 0)
    assert fakes[0].weights == "treepo-run-0"


def test_trls_client_sends_user_and_password_and_shows_neither(stack: ExitStack) -> None:
    fake = stack.enter_context(PolicyFake(NCCL))
    client = _Client(ServerConnection(fake.url.replace("http://", "http://me:secret@")), 51000)
    client.init_communicator("cuda")
    client.wait()
    assert client.base_url == fake.url
    assert fake.calls == ["/init_weight_transfer_engine"]
    fake.die()
    with pytest.raises(ServerLostError) as error:
        client.get_world_size()
    assert "secret" not in str(error.value)


def test_pieces_are_copies_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step of a gathering may put something else into the same memory."""
    memory = torch.zeros(3)
    monkeypatch.setattr(sent_weights, "_BYTES_PER_PIECE", 30)  # 12 bytes each

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            yield str(i), memory.fill_(i)

    pieces = [[(name, tensor.tolist()) for name, tensor in piece] for piece in _pieces(gathered(), memory.device)]
    assert pieces == [[("0", [0] * 3), ("1", [1] * 3)], [("2", [2] * 3)]]


def test_a_group_takes_the_next_free_port() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert free_port(port) > port
    with pytest.raises(ValueError, match=r"No port from `vllm_group_port` \(65536\)"):
        free_port(2**16)


def test_the_card_is_that_of_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `accelerate launch` the device has no number, and other threads begin with the first card."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert SentWeights("", "run", torch.device("cuda"), 51000, print)._device == torch.device("cuda", 3)


def test_a_card_and_a_new_vllm_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_weights, "is_vllm_available", lambda min_version: min_version == "0.29.0")
    assert can_send(torch.device("cuda", 1))
    assert not can_send(torch.device("cpu"))
    monkeypatch.setattr(sent_weights, "is_vllm_available", lambda min_version: False)
    assert not can_send(torch.device("cuda"))
