"""Servers that are started anew while a training runs, unnoticed or wrongly: what they sample from, what is said."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.fake_vllm import scripted, until
from tests.support.policy_fake import (
    PolicyFake,
    admit,
    engine_over,
    give,
    lose,
    opened,
    sample,
    versions_of,
    write_version,
)
from treepo_trl.servers import versions
from treepo_trl.servers.connection import ServerLostError
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.versions import AdapterVersions, WeightVersions


pytestmark = pytest.mark.usefixtures("lost_servers_are_asked_often")


def error_of(engine: VLLMServerEngine, position: int) -> str:
    return engine.fleet.servers[position].error


@pytest.mark.parametrize("kind", [AdapterVersions, WeightVersions])
@pytest.mark.parametrize("count", [1, 2])
def test_no_batch_is_sampled_from_old_weights(stack: ExitStack, tmp_path: Path, kind: Any, count: int) -> None:
    servers, fakes = opened(stack, tmp_path, count, versions=kind)
    give(servers, 0)
    engine = engine_over(stack, servers)
    for step in range(3):
        fakes[0].forget()
        sample(engine)  # of the version before, as an evaluation is
        until(lambda: len(engine.fleet.living()) == count)
        sample(engine)
        fakes[-1].forget()
        give(servers, step + 1)
        sample(engine)
        until(lambda: len(engine.fleet.living()) == count)
        sample(engine)
        for fake in fakes:
            assert fake.served == {f"treepo-run-{step}", f"treepo-run-{step + 1}"}
            fake.served.discard(f"treepo-run-{step}")
    assert engine.fleet.num_lost == 6


def wrong_model(fake: PolicyFake) -> None:
    fake.changes = {**fake.changes, "model_config": {"model": "/models/other"}}


def wrong_length(fake: PolicyFake) -> None:
    fake.changes = {**fake.changes, "model_config": {"max_model_len": 32}}


def wrong_type(fake: PolicyFake) -> None:
    fake.changes = {**fake.changes, "model_config": {"dtype": "torch.float16"}}


def wrong_version(fake: PolicyFake) -> None:
    fake.version = "0.30.2"


def without_adapters(fake: PolicyFake) -> None:
    fake.changes = {}


def without_loading(fake: PolicyFake) -> None:
    fake.loads_adapters = False


def without_scale_out(fake: PolicyFake) -> None:
    fake.has_scale_out = False


def without_tokens_of_the_probe(fake: PolicyFake) -> None:
    fake.offset = 0.2


SETTINGS = ("changes", "version", "loads_adapters", "has_scale_out", "offset")
WRONG: list[tuple[Callable[[PolicyFake], None], str]] = [
    (wrong_model, "serves '/models/other'"),
    (wrong_length, "started with a context of 32"),
    (wrong_type, "computes in float16, and in float32 before it was started anew"),
    (wrong_version, "is vLLM 0.30.2"),
    (without_adapters, "serves no adapters"),
    (without_loading, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    (without_scale_out, "--enable-scale-out"),
    (without_tokens_of_the_probe, "computes another model"),
]


@pytest.mark.needs_vllm
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(("change", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_server_that_was_started_wrongly_is_kept_out(
    stack: ExitStack, tmp_path: Path, position: int, change: Callable[[PolicyFake], None], reason: str
) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    wrong, right = fakes[position], fakes[1 - position]
    good = dict(vars(wrong))
    wrong.forget()
    change(wrong)
    give(servers, 1)
    until(lambda: reason in error_of(engine, position))
    give(servers, 2)  # a version that it may have loaded makes it no member of the training
    sample(engine)
    assert (wrong.served, right.served) == (set(), {"treepo-run-2"})
    assert reason in error_of(engine, position)

    vars(wrong).update({name: good[name] for name in SETTINGS})
    until(lambda: len(engine.fleet.living()) == 2)
    sample(engine)
    assert wrong.served == {"treepo-run-2"}


def test_a_server_that_one_engine_has_lost_is_kept_out_of_the_other(stack: ExitStack, tmp_path: Path) -> None:
    """It has loaded the version by then, and has nothing open that its restart would have closed."""
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    first, second = engine_over(stack, servers), engine_over(stack, servers)
    fakes[1].forget()
    fakes[1].offset = 0.2
    sample(first)
    until(lambda: "computes another model" in error_of(first, 1))
    sample(second)
    assert [fake.served for fake in fakes] == [{"treepo-run-0"}, set()]
    fakes[1].offset = 0.0
    until(lambda: len(servers.living()) == 2)
    sample(second)
    assert fakes[1].served == {"treepo-run-0"}


@pytest.mark.needs_vllm
def test_without_another_server_the_reasons_are_told(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    engine, servers.timeout = engine_over(stack, servers), 0.1
    for fake, change in zip(fakes, (wrong_model, wrong_version), strict=True):
        fake.forget()
        change(fake)
    give(servers, 1)
    reasons = ("serves '/models/other'", "is vLLM 0.30.2")
    until(lambda: all(reason in error_of(engine, position) for position, reason in enumerate(reasons)))
    with pytest.raises(RuntimeError, match=r"No vLLM server has answered for 0\.1 s") as error:
        sample(engine)
    for fake, reason in zip(fakes, reasons, strict=True):
        assert fake.url in str(error.value)
        assert reason in str(error.value)


def test_a_version_that_one_server_cannot_load(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    engine = engine_over(stack, servers)
    fakes[0].can_load = False
    give(servers, 1)
    assert "rank 64 is too large" in error_of(engine, 0)
    sample(engine)
    assert [fake.served for fake in fakes] == [set(), {"treepo-run-1"}]
    fakes[0].can_load = True
    until(lambda: len(engine.fleet.living()) == 2)
    fakes[0].can_load = fakes[1].can_load = False
    with pytest.raises(ValueError, match="rank 64 is too large"):
        give(servers, 2)


def test_a_version_that_none_of_the_servers_that_are_left_can_load_is_an_error(
    stack: ExitStack, tmp_path: Path
) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    fakes[0].die()
    give(servers, 1)
    fakes[1].can_load = False
    with pytest.raises(ValueError, match="rank 64 is too large"):
        give(servers, 2)


def test_a_version_that_one_server_cannot_load_while_the_other_goes_away_is_an_error(
    stack: ExitStack, tmp_path: Path
) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    fakes[0].die()  # nobody knows yet
    fakes[1].can_load = False
    with pytest.raises(ValueError, match="rank 64 is too large"):
        give(servers, 1)


def test_a_server_that_is_started_anew_between_loading_and_probing_is_lost(stack: ExitStack, tmp_path: Path) -> None:
    servers, fakes = opened(stack, tmp_path, 2)
    give(servers, 0)
    fakes[0]._load = lambda name, folder: web.Response(text="")  # and has forgotten it
    give(servers, 1)
    (lost,) = (server for server in servers.servers if not server.is_up)
    assert lost.error.startswith(f"The answer of {fakes[0].url} to POST")
    assert "status 404" in lost.error


LOADS: list[tuple[Any, str]] = [(AdapterVersions, "/v1/load_lora_adapter"), (WeightVersions, "/collective_rpc")]


@pytest.mark.parametrize(("kind", "path"), LOADS)
def test_a_server_that_hangs_while_it_loads_keeps_nobody_waiting(
    stack: ExitStack, tmp_path: Path, kind: Any, path: str
) -> None:
    """The others get the next versions; what it was loading is old then, and it gets the one of now."""
    servers, fakes = opened(stack, tmp_path, 2, versions=kind)
    give(servers, 0)
    engine = engine_over(stack, servers)
    for step in (1, 2):
        fakes[0].hangs = {path}
        fakes[0].forget()
        give(servers, 3 * step)
        until(lambda: fakes[0].hanging)
        with ThreadPoolExecutor(1) as thread:
            given = [thread.submit(give, servers, 3 * step + more) for more in (1, 2)]
            try:
                until(given[-1].done)
            finally:
                fakes[0].hangs = set()
        until(lambda: len(engine.fleet.living()) == 2)
        for fake in fakes:
            fake.served.clear()
        sample(engine)
        assert [fake.served for fake in fakes] == [{f"treepo-run-{3 * step + 2}"}] * 2


@pytest.mark.parametrize(("kind", "path"), LOADS)
def test_a_load_without_an_answer_is_a_lost_server(
    stack: ExitStack, tmp_path: Path, kind: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder can be read: nothing is said of that, though `/health` answers."""
    servers, (fake, _) = opened(stack, tmp_path, 2, versions=kind)
    give(servers, 0)
    fake.hangs = {path}
    connection = servers.servers[0].connection
    post = connection.post

    async def post_impatiently(where: str, json: Any = None, timeout: float | None = None) -> Any:
        return await post(where, json, 0.1 if timeout == versions.LOAD_TIMEOUT else timeout)

    monkeypatch.setattr(connection, "post", post_impatiently)  # the other server has its time
    give(servers, 1)
    (lost,) = (server for server in servers.servers if not server.is_up)
    assert lost.error.startswith(f"{fake.url} has not answered POST {path} for 0.1 s")
    with pytest.raises(ServerLostError, match="has not answered POST"):
        admit(servers, 0)


@pytest.mark.parametrize("is_probed", [True, False])
@pytest.mark.parametrize("is_given", [True, False])
def test_a_server_that_generates_nothing_is_not_admitted(
    stack: ExitStack, tmp_path: Path, is_probed: bool, is_given: bool
) -> None:
    """It answers everything that needs no engine, and would get a batch again and again."""
    servers, (fake,) = opened(stack, tmp_path, is_probed=is_probed)
    if is_given:
        give(servers, 0)
    fake.script, servers.servers[0].connection.timeout = scripted(then="silence"), 0.1
    with pytest.raises(ServerLostError, match=r"has not answered POST /inference/v1/generate for 0\.1 s"):
        admit(servers, 0)
    fake.script, servers.servers[0].connection.timeout = None, 60.0
    admit(servers, 0)


@pytest.mark.parametrize("is_probed", [True, False])
def test_a_version_that_a_returning_server_got_first_is_no_restart(
    stack: ExitStack, tmp_path: Path, is_probed: bool
) -> None:
    """Nor is it compared with what the others have computed with the version before: it waits for them."""
    servers, fakes = opened(stack, tmp_path, 2, is_probed=is_probed)
    give(servers, 0)
    fakes[0].die()
    lose(servers, 0)
    versions_of(servers).write(5000, write_version)  # far in nats from the one before
    fakes[0].restart()
    with pytest.raises(ServerLostError, match="nothing to compare it with yet") if is_probed else nullcontext():
        admit(servers, 0)  # between the writing and the giving
    servers.distribute()
    assert servers.num_lost == 1
    admit(servers, 0)
    assert all("treepo-run-5000" in fake.adapters for fake in fakes)
