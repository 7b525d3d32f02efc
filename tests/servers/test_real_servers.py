"""The engine over two real vLLM servers on a CPU, with a tiny random model in float32."""

import re
import threading
import urllib.request

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.fake_vllm import until
from tests.support.sampling import trees_of
from tests.support.segments import EOS, GREEDY, PROMPTS, complete, drain, full_logits, full_logprobs, generated
from tests.support.vllm_servers import VLLMServer
from treepo_trl import TreeSamplingConfig
from treepo_trl.engines import SamplingOptions, SegmentEngineError, SegmentRequest
from treepo_trl.servers.connection import ServerConnection, run_in_loop
from treepo_trl.servers.engine import VLLMServerEngine
from treepo_trl.servers.fleet import Fleet


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def reference(tiny_model_dir: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def engine_of(servers: list[VLLMServer], options: SamplingOptions | None = None, **kwargs: bool) -> VLLMServerEngine:
    return VLLMServerEngine(Fleet([server.url for server in servers]), [EOS], options, **kwargs)


def counted(servers: list[VLLMServer], name: str) -> float:
    """A counter of the servers, by its name and labels, summed over both."""
    texts = [urllib.request.urlopen(server.url + "/metrics").read().decode() for server in servers]
    pattern = rf"^vllm:{name}[^}}]*\}} ([\d.e+]+)"
    return sum(float(number) for text in texts for number in re.findall(pattern, text, re.MULTILINE))


def num_connections(servers: list[VLLMServer]) -> int:
    """Connections that the processes of the servers' addresses hold open."""
    processes = [psutil.Process(server.process.pid) for server in servers if server.process is not None]
    connections = [each for process in processes for each in process.net_connections("tcp")]
    return sum(each.status == psutil.CONN_ESTABLISHED for each in connections)


def test_greedy_segments_are_those_of_generate(servers: list[VLLMServer], reference: PreTrainedModel) -> None:
    engine = engine_of(servers, GREEDY)
    assert (engine.context_length, engine.block_size, engine.num_slots(1)) == (512, 32, 64)
    for segment_length in (3, 20):
        completions, _ = complete(engine, PROMPTS, segment_length, 20)
        assert completions == generated(reference, PROMPTS, 20)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trees_have_the_models_log_probabilities(
    servers: list[VLLMServer], reference: PreTrainedModel, temperature: float
) -> None:
    engine = engine_of(servers, SamplingOptions(temperature=temperature))
    config = TreeSamplingConfig(num_generations=8, max_completion_length=80, segment_length=32, stop_repetition=False)
    prompts = [[5 + i, *range(5, 45)] for i in range(4)]
    trees = trees_of(engine, config, prompts)
    for tree in trees:
        assert len(tree.leaves) == 8
        for leaf in tree.leaves[:3]:
            completion = tree.completion_ids(leaf)
            logits = full_logits(reference, tree.prompt_ids + completion)[len(tree.prompt_ids) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(tree.logprobs(leaf)), expected, atol=1e-3, rtol=0)
    assert engine.num_cached_tokens > 0.3 * engine.num_prompt_tokens  # children find their parents' blocks


def test_entropies_are_lower_bounds_close_to_the_exact_ones(
    servers: list[VLLMServer], reference: PreTrainedModel
) -> None:
    engine = engine_of(servers, with_entropies=True)
    results = drain(engine, [SegmentRequest(i, PROMPTS[1], 12, tree=i) for i in range(8)]).values()
    exact, bounds = [], []
    for result in results:
        n = len(result.token_ids)
        assert result.entropies is not None
        assert len(result.entropies) == n
        logprobs = full_logits(reference, PROMPTS[1] + result.token_ids)[-n - 1 : -1].log_softmax(-1)
        exact += torch.special.entr(logprobs.exp()).sum(-1).tolist()
        bounds += result.entropies
        expected = full_logprobs(reference, PROMPTS[1], result.token_ids)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-3, rtol=0)
    difference = torch.tensor(exact) - torch.tensor(bounds)
    assert difference.min() > -1e-3
    assert difference.mean() < 0.1


def test_options_reach_the_server(servers: list[VLLMServer]) -> None:
    def drawn(**options: float) -> tuple[list[int], list[float], list[float] | None]:
        engine = engine_of(servers[:1], SamplingOptions(**options), with_entropies=True)  # pyright: ignore
        result = drain(engine, [SegmentRequest(0, PROMPTS[1], 6)])[0]
        return result.token_ids, result.logprobs, result.entropies

    greedy = drawn(temperature=0.0)[0]
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        token_ids, logprobs, entropies = drawn(temperature=1.3, **options)
        assert token_ids == greedy
        assert logprobs == pytest.approx([0.0] * len(greedy), abs=1e-4)  # of the sampling distribution
        assert entropies == pytest.approx([0.0] * len(greedy), abs=1e-4)
    assert drawn(temperature=0.0, repetition_penalty=50.0)[0] != greedy


def test_what_a_server_refuses(servers: list[VLLMServer]) -> None:
    engine = engine_of(servers)
    for token_ids, words in (([5] * 600, "longer than the maximum model length"), ([5000], "out of vocabulary")):
        with pytest.raises(SegmentEngineError, match=words) as error:
            drain(engine, [SegmentRequest(7, token_ids, 4)])
        assert error.value.request_id == 7
    engine.fleet.model = "treepo-7"
    with pytest.raises(SegmentEngineError, match=r"status 404.*`treepo-7` does not exist"):
        drain(engine, [SegmentRequest(0, [5], 4)])


def test_abort_leaves_nothing_in_the_servers(servers: list[VLLMServer]) -> None:
    engine = VLLMServerEngine(Fleet([server.url for server in servers]), [])  # nothing ends a segment
    requests = [SegmentRequest(i, [5 + i % 50, 5 + i // 50], 500 if i else 2, tree=i) for i in range(512)]
    engine.submit(requests[:64])  # as many as the servers run at once
    engine.collect()
    others = [ServerConnection(server.url) for server in servers]
    try:
        for other in others:
            run_in_loop(
                other.post("/pause?mode=keep")
            )  # so that nothing ends before the abort, however slow this process is
        before = counted(servers, r"generation_tokens_total\{")
        engine.submit(requests[64:])
        until(lambda: num_connections(servers) >= 448)
        engine.abort()
        until(lambda: num_connections(servers) < 64)
    finally:
        for other in others:
            run_in_loop(other.post("/resume"))
    assert len(drain(engine, [SegmentRequest(0, [5], 2)])[0].token_ids) <= 2
    until(lambda: not counted(servers, r"num_requests_(?:running|waiting)\{"))
    assert counted(servers, r"generation_tokens_total\{") - before < 448 * 500 / 4


def test_a_cache_can_be_emptied(servers: list[VLLMServer]) -> None:
    engine = engine_of(servers[:1])
    request = SegmentRequest(0, [*range(5, 64)] * 2, 1)
    drain(engine, [request])
    before = engine.num_cached_tokens
    drain(engine, [request])
    assert engine.num_cached_tokens - before == 96  # three full blocks of 118 tokens
    engine.reset_prefix_cache()
    drain(engine, [request])
    assert engine.num_cached_tokens - before == 96


def test_kill_of_one_of_two_servers_in_mid_batch(servers: list[VLLMServer], reference: PreTrainedModel) -> None:
    """The last test: it leaves one server."""
    engine = engine_of(servers)
    config = TreeSamplingConfig(num_generations=8, max_completion_length=128, segment_length=16, stop_repetition=False)
    prompts = [[5 + i, *range(5, 25)] for i in range(24)]
    threading.Timer(0.5, servers[0].kill).start()
    trees = trees_of(engine, config, prompts)
    while engine.fleet.num_lost == 0:  # a fast machine needs further batches until then
        trees = trees_of(engine, config, prompts)
    assert [len(tree.leaves) for tree in trees] == [8] * 24
    for tree in trees[::6]:
        completion = tree.completion_ids(tree.leaves[-1])
        expected = full_logprobs(reference, tree.prompt_ids, completion)
        torch.testing.assert_close(torch.tensor(tree.logprobs(tree.leaves[-1])), expected, atol=1e-3, rtol=0)
    assert engine.num_resent > 0
    assert [server.url for server in engine.fleet.living()] == [servers[1].url]
    engine.close()
