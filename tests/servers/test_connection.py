"""One server over HTTP: what an answer or its lack becomes, what is told of a server, and what is never told."""

import logging
import traceback
from collections.abc import Iterator

import pytest

from tests.support.fake_vllm import VLLM_VERSION, FakeVLLM, scripted, until
from treepo_trl.engines import SegmentRequest
from treepo_trl.servers.connection import GENERATE, ServerConnection, ServerLostError, ServerRefusedError, run_in_loop
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.facts import ServerFacts
from treepo_trl.servers.fleet import Fleet


BODY = {"token_ids": [1], "sampling_params": {"max_tokens": 1}}


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        yield server


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (404, ServerRefusedError, "has status 404: scripted 404"),
        (500, ServerLostError, "with status 500: scripted 500"),
        (503, ServerLostError, "with status 503: scripted 503"),
        ("no json", ServerRefusedError, "is no JSON: <html>a gateway"),
        ("silence", ServerLostError, "has not answered POST /inference/v1/generate for 0.2 s"),
        ("close", ServerLostError, "gives no answer"),
        ("die", ServerLostError, "gives no answer"),
    ],
)
def test_what_an_answer_becomes(server: FakeVLLM, act: int | str, error: type[Exception], words: str) -> None:
    connection = ServerConnection(server.url)
    assert run_in_loop(connection.post(GENERATE, BODY))["choices"][0]["token_ids"] == [1]
    server.script = scripted(act)  # pyright: ignore[reportArgumentType]
    with pytest.raises(error, match=words) as caught:
        run_in_loop(connection.post(GENERATE, BODY, timeout=0.2 if act == "silence" else None))
    assert server.url in str(caught.value)
    if isinstance(caught.value, ServerRefusedError):
        assert caught.value.status in (200, 404)
    if act != "die":
        assert run_in_loop(connection.post(GENERATE, BODY))["choices"][0]["token_ids"] == [1]


def test_where_nobody_listens(server: FakeVLLM) -> None:
    connection = ServerConnection(server.url)
    assert run_in_loop(connection.is_healthy())
    server.die()
    assert not run_in_loop(connection.is_healthy())
    for ask in (connection.facts, connection.models, connection.can_generate):
        with pytest.raises(ServerLostError, match="gives no answer"):
            run_in_loop(ask())
    server.start()
    assert run_in_loop(connection.is_healthy())


def test_facts_and_models(server: FakeVLLM) -> None:
    server.changes = {
        "parallel_config": {"data_parallel_size": 2},
        "model_config": {"served_model_name": ["first", "second"], "max_logprobs": -1},
        "lora_config": {"max_loras": 3, "max_lora_rank": 16},
    }
    connection = ServerConnection(server.url + "/")
    assert run_in_loop(connection.models()) == {"base": "/models/base"}
    assert run_in_loop(connection.facts()) == ServerFacts(
        version=VLLM_VERSION,
        model="/models/base",
        model_name="first",
        context_length=4096,
        dtype="float32",
        quantization=None,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        prefix_caching=True,
        block_size=16,
        num_cache_tokens=16_000,  # vLLM adds the blocks of all ranks up
        num_slots=16,  # and tells the slots of one
        data_parallel_size=2,
        max_loras=3,
        max_lora_rank=16,
    )


def test_what_a_server_lacks_is_named_with_its_flag(server: FakeVLLM) -> None:
    connection = ServerConnection(server.url)
    assert run_in_loop(connection.can_generate())
    server.has_scale_out = server.has_dev_mode = False
    assert not run_in_loop(connection.can_generate())
    with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
        run_in_loop(connection.facts())
    with pytest.raises(ValueError, match=f"What answers at {server.url}/elsewhere is no vLLM server"):
        run_in_loop(ServerConnection(server.url + "/elsewhere").facts())
    with pytest.raises(ValueError, match="is no vLLM server"):
        run_in_loop(ServerConnection(server.url + "/elsewhere").models())
    server.changes = {"cache_config": {"block_size": 16}}
    server.has_dev_mode = True
    server._config = dict  # another form
    with pytest.raises(ValueError, match=r"vLLM 0\.31\.0, describes itself in another form"):
        run_in_loop(connection.facts())


def test_a_cache_that_was_not_emptied_is_an_error(server: FakeVLLM) -> None:
    connection = ServerConnection(server.url)
    run_in_loop(connection.reset_prefix_cache())
    assert server.num_resets == 1
    server.resets = False
    with pytest.raises(RuntimeError, match="has not emptied its prefix cache"):
        run_in_loop(connection.reset_prefix_cache())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://me:secret@",
        "http://me:secret@host:x",
        "http://me:0,secret@host:x",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="write it as `http://host:port`") as error:
        ServerConnection(url)
    assert "secret" not in "".join(traceback.format_exception(error.value))


def test_proxies_of_the_environment_are_ignored(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run_in_loop(ServerConnection(server.url).is_healthy())


def test_a_password_is_sent_and_never_shown(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = VLLMServerEngine(Fleet([server.url.replace("//", "//me:s%40cret@")], timeout=60.0), [0])
    connection = engine.fleet.servers[0].connection
    assert run_in_loop(connection.is_healthy())
    assert server.authorizations == {"Basic bWU6c0BjcmV0"}  # me:s@cret
    told = [repr(connection), connection.url, str(vars(connection).get("url"))]
    for act in (404, 500, "silence", "close", "no json", "other json", "die"):
        server.script = scripted(act)  # pyright: ignore[reportArgumentType]
        connection.timeout = 0.2 if act == "silence" else 60.0
        for fail in (
            lambda: run_in_loop(connection.post(GENERATE, BODY)),
            lambda: list(engine.complete([SegmentRequest(0, [1], 1)])),
        ):
            try:
                fail()
            except Exception as error:
                told += traceback.format_exception(error)
                told.append(repr(error))
        if act == "die":
            break
        server.script = None
        until(engine.fleet.living)  # it has found the server again
    engine.close()
    text = "".join([*told, *(record.getMessage() for record in caplog.records)])
    assert "scripted 404" in text
    assert "is lost" in text
    for secret in ("s@cret", "s%40cret", "bWU6"):
        assert secret not in text
