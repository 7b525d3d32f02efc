"""What servers refuse or answer wrongly, and the end of requests that nobody waits for."""

from typing import Any

import pytest

from tests.support.fake_vllm import Act, FakeVLLM, engine_of, fake_servers, path_determined, scripted, until
from tests.support.fakes import EOS
from tests.support.sampling import prompts_of, trees_of
from treepo_trl import TreeSampler
from treepo_trl.engines import SegmentEngineError
from treepo_trl.servers.engine import VLLMServerEngine

from .test_faults import CONFIG, requests_of, same_trees


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (400, "status 400: scripted 400"),
        (404, "status 404: scripted 404"),
        ("no json", "is no JSON: <html>"),
        ("other json", "in a form that is not vLLM's"),
    ],
)
def test_what_a_server_refuses_is_named_and_not_repeated(act: Act, words: str) -> None:
    with fake_servers(2, path_determined()) as servers:
        for server in servers:
            server.script = lambda body: act if body["token_ids"][0] == 102 else "answer"
        engine = engine_of(servers, model="adapter-7")
        with pytest.raises(SegmentEngineError, match=words) as error:
            TreeSampler(engine, CONFIG, [EOS]).sample(prompts_of(4), seed=0)
        assert "of 3 tokens and for the model 'adapter-7'" in str(error.value)
        (server,) = (server for server in servers if 102 in server.trees)
        assert server.url in str(error.value)
        (note,) = error.value.__notes__
        assert note.startswith("While sampling prompt 2 of 4")
        assert engine.fleet.num_lost == engine.num_resent == 0
        # The engine is usable: nothing of the batch is left in it.
        server.script = None
        assert len(trees_of(engine, CONFIG, 2)) == 2


def wrong(result: dict[str, Any]) -> Any:
    """A server whose choice is changed."""

    class Wrong(FakeVLLM):
        def _proper(self, body: dict[str, Any]) -> dict[str, Any]:
            answer = super()._proper(body)
            answer["choices"][0] |= result
            return answer

    return Wrong


@pytest.mark.parametrize(
    "change", [{"token_ids": []}, {"token_ids": [1, 1]}, {"finish_reason": "error"}, {"finish_reason": None}]
)
def test_an_answer_without_a_log_probability_for_each_token_is_refused(change: dict[str, Any]) -> None:
    with wrong(change)() as server:
        engine: VLLMServerEngine = engine_of([server])
        with pytest.raises(SegmentEngineError, match="expected one for each token"):
            list(engine.complete(requests_of(1, tokens=4)))


def test_abort_closes_the_connections_and_leaves_the_engine_usable() -> None:
    with fake_servers(2, path_determined()) as servers:
        engine = engine_of(servers)
        for server in servers:
            server.script = scripted("answer", then="silence")
        engine.submit(requests_of(8))
        engine.collect()
        until(lambda: sum(server.num_running for server in servers) == 6)
        engine.abort()
        assert engine.collect() == []
        until(lambda: sum(server.num_running for server in servers) == 0)
        for server in servers:
            server.script = None
        assert same_trees(trees_of(engine, CONFIG, 4))
        assert engine.fleet.num_lost == 0


def test_abort_without_a_server_returns() -> None:
    with fake_servers(1) as (server,):
        engine = engine_of([server])
        server.die()
        engine.submit(requests_of(3))
        until(lambda: engine.fleet.num_lost == 1)
        engine.abort()
        assert engine.collect() == []
        engine.close()
