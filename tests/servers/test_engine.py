"""The engine over servers: trees, placement, what is sent, limits, entropies. Faults: `test_faults.py`."""

import math
import resource
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_vllm import engine_of, fake_servers, markov, path_determined, scripted, until
from tests.support.fakes import EOS, FakeEngine, MarkovEngine, memoryless
from tests.support.sampling import configs, fingerprint, make_config, prompts_of, trees_of
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SamplingOptions, SegmentRequest, SegmentResult
from treepo_trl.engines.vllm_sampling import entropies_of_answer


def requests_of(*trees: int, tokens: int = 4) -> list[SegmentRequest]:
    return [SegmentRequest(i, [100 + tree] * 3, tokens, tree=tree) for i, tree in enumerate(trees)]


def serve(engine: Any, requests: list[SegmentRequest]) -> list[SegmentResult]:
    """Results without the end of their trees."""
    engine.submit(requests)
    results: list[SegmentResult] = []
    while len(results) < len(requests):
        results += engine.collect()
    return results


def test_servers_know_their_model_by_one_name() -> None:
    other = {"model_config": {"served_model_name": "another"}}
    with fake_servers(1) as (one,), fake_servers(1, changes=other) as (two,):
        with pytest.raises(ValueError, match=r"different names: .*'another'.*`--served-model-name`"):
            engine_of([one, two])
        engine_of([one, two], model="an-adapter")


# Trees


@settings(max_examples=20)
@given(configs(), st.sampled_from([0.02, 0.2]), st.integers(1, 4))
def test_trees_are_those_of_an_engine_in_this_process(config: TreeSamplingConfig, stop: float, count: int) -> None:
    if config.branching_policy == "entropy":
        config = replace(config, branching_policy="low_prob")

    class PathEngine(FakeEngine):
        def answer(self, request: SegmentRequest) -> SegmentResult:
            return path_determined(stop)(request)

    limits = {"block_size": 16, "context_length": 4096, "num_cache_tokens": 32_000}
    expected = trees_of(PathEngine(memoryless(stop), slots=16, **limits), config, count)
    with fake_servers(2, path_determined(stop)) as servers:
        engine = engine_of(servers)
        sampler = TreeSampler(engine, config, [EOS])
        assert fingerprint(sampler.sample(prompts_of(count), seed=0)) == fingerprint(expected)
        # Every tree has lived on one server, and none is left there.
        first, second = (set(server.trees) for server in servers)
        assert not first & second
        until(lambda: [server.num_trees for server in engine.fleet.servers] == [0, 0])
        assert sampler.stats.num_prompt_tokens == sum(len(b["token_ids"]) for s in servers for b in s.bodies)


def test_weighted_means_over_trees_of_several_servers_are_those_of_the_chain() -> None:
    """A chain whose completions are known exactly, as in `tests/evaluation/test_estimators.py`."""
    config = make_config(8, max_completion_length=12, segment_length=2, fallback_policy="none")
    with fake_servers(1, markov(1)) as one, fake_servers(1, markov(1, seed=1)) as other:
        trees = trees_of(engine_of([*one, *other]), config, [[9]] * 150)
    for name, exact in MarkovEngine.exact(12).items():
        means = [
            sum(
                weight * MarkovEngine.observed(tree.completion_ids(leaf))[name]
                for weight, leaf in zip(tree.leaf_weights(), tree.leaves, strict=True)
            )
            for tree in trees
        ]
        assert abs(np.mean(means) - exact) < 4 * np.std(means) / math.sqrt(len(means)), name


# Placement


def test_a_tree_goes_where_the_fewest_are_unfinished_and_stays() -> None:
    with fake_servers(2) as (first, second):
        engine = engine_of([first, second])
        serve(engine, requests_of(0, 0, 1, 2, 3, 0))
        assert (first.trees, second.trees) == ([100, 100, 102, 100], [101, 103])
        engine.end_tree(1)  # one is left on the second, two on the first
        serve(engine, requests_of(0, 2, 3, 4, 5))
        assert first.trees[4:] == [100, 102, 105]  # 4 makes it two and two, and 5 takes the first of equals
        assert second.trees[2:] == [103, 104]
        engine.abort()  # no tree is unfinished any more
        serve(engine, requests_of(3, 5))
        assert (first.trees[-1], second.trees[-1]) == (103, 105)


def test_trees_are_pinned_to_data_parallel_ranks() -> None:
    changes = {"parallel_config": {"data_parallel_size": 2}}
    with fake_servers(1, changes=changes) as (ranked,), fake_servers(1) as (single,):
        engine = engine_of([ranked, single])
        assert engine.num_slots(1) == 24
        serve(engine, requests_of(0, 1, 2, 3, 4, 5))
        serve(engine, requests_of(0, 3))
        rank_of = dict(zip(ranked.trees, [each.get("x-data-parallel-rank") for each in ranked.headers], strict=True))
        assert all("x-data-parallel-rank" not in each for each in single.headers)
        ranks = [(tree, each["x-data-parallel-rank"]) for tree, each in zip(ranked.trees, ranked.headers, strict=True)]
        assert len(set(ranks)) == len(rank_of) == 4  # no tree has two ranks
        assert sorted(rank_of.values()) == ["0", "0", "1", "1"]
        assert len(set(single.trees)) == 2


# What is sent


def test_options_travel_in_vllms_names() -> None:
    with fake_servers(1) as (server,):
        options = SamplingOptions(temperature=0.5, top_p=0.9, top_k=-1, min_p=None, repetition_penalty=1.1)
        engine = engine_of([server], eos=7, options=options, generation_kwargs={"top_p": 0.8, "seed": 3})
        assert engine.fleet.model == "base"
        serve(engine, requests_of(0))
        engine.fleet.model = "adapter-1"
        serve(engine, requests_of(0))
    first, second = server.bodies
    assert first["model"] == "base"
    assert first["token_ids"] == [100] * 3
    assert first["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "logprobs": 0,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "detokenize": False,
        "seed": 3,
        "max_tokens": 4,
    }
    assert second == {**first, "model": "adapter-1"}


def test_no_segment_goes_beyond_the_context() -> None:
    with fake_servers(1, changes={"model_config": {"max_model_len": 10}}) as small, fake_servers(1) as large:
        engine = engine_of([*large, *small])
        assert engine.context_length == 10
        requests = [SegmentRequest(i, [5] * length, 4, tree=0) for i, length in enumerate((3, 6, 7, 9))]
        results = sorted(serve(engine, requests), key=lambda result: result.request_id)
        assert [len(result.token_ids) for result in results] == [4, 4, 3, 1]


def test_cached_tokens_are_counted_where_they_are_told() -> None:
    with fake_servers(2) as (first, second):
        first.cached_tokens, second.cached_tokens = 2, None  # without `--enable-prompt-tokens-details`
        engine = engine_of([first, second])
        serve(engine, requests_of(0, 1, 0))
        assert (engine.num_prompt_tokens, engine.num_cached_tokens) == (9, 4)


def test_wake_ends_the_wait() -> None:
    with fake_servers(1) as (server,):
        server.script = scripted("silence")
        engine = engine_of([server])
        engine.submit(requests_of(0))
        answers = iter([False, False, True])
        assert engine.collect(lambda: next(answers)) == []
        engine.abort()


# Limits


def test_limits_are_sums_and_blocks_must_agree() -> None:
    with fake_servers(2) as servers, fake_servers(1, changes={"cache_config": {"block_size": 128}}) as (other,):
        engine = engine_of(servers)
        assert engine.num_slots(1) == 16
        assert engine.num_cache_tokens == 32_000
        assert engine.block_size == 16
        engine.reset_prefix_cache()
        assert [server.num_resets for server in servers] == [1, 1]
        with pytest.raises(ValueError, match=f"{other.url} has 128 tokens. .*same `--block-size`"):
            engine_of([*servers, other])
        other.changes = {"cache_config": {"num_gpu_blocks": None}}
        assert engine_of([*servers, other]).num_cache_tokens is None


@pytest.mark.parametrize("options", [{"logit_bias": {1: math.inf}}, {"bad_words": {"a", "b"}}])
def test_what_cannot_be_sent_is_refused_at_once(options: Any) -> None:
    with fake_servers(1) as servers, pytest.raises(ValueError, match="`generation_kwargs` cannot be sent"):
        engine_of(servers, generation_kwargs=options)


def test_a_server_without_token_ids_is_refused_at_once() -> None:
    with fake_servers(2) as (first, second):
        second.has_scale_out = False
        with pytest.raises(ValueError, match=f"server at {second.url} does not take token ids.*--enable-scale-out"):
            engine_of([first, second])
    with pytest.raises(ValueError, match="at least one address"):
        engine_of([])


def test_connections_of_all_slots_are_allowed_or_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection counts as a file: without one a server would look lost."""
    set_limits: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: set_limits.append(limits))
    with fake_servers(2, changes={"scheduler_config": {"max_num_seqs": 1000}}) as servers:
        for limits in ((1024, 1_000_000), (1024, resource.RLIM_INFINITY), (4096, 4096)):
            monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
            engine_of(servers)
        assert set_limits == [(3024, 1_000_000), (3024, resource.RLIM_INFINITY)]
        monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 3000))
        with pytest.raises(ValueError, match=r"run 2000 requests at once.*ulimit -Hn 3024"):
            engine_of(servers)


# Entropies


def test_entropies_by_hand() -> None:
    def entry(*probabilities: float) -> dict[str, Any]:
        """The drawn token first."""
        return {"top_logprobs": [{"logprob": math.log(p) if p else -9999.0} for p in probabilities]}

    values = entropies_of_answer(
        [
            entry(0.25, 0.5, 0.25),  # all of the distribution, the drawn token among the likeliest
            entry(0.05, 0.4, 0.2),  # the drawn token has taken the third place: 0.4 are left, each at most 0.2
            entry(0.2, 0.4, 0.1),  # 0.3 are left, each at most 0.1
            entry(1 - 1e-6, 0.0, 0.0),  # top_k = 1, up to rounding: vLLM writes -9999 for the others
        ]
    )
    known = -0.4 * math.log(0.4) - 0.2 * math.log(0.2)
    assert values == pytest.approx(
        [
            0.5 * math.log(2) + 0.5 * math.log(4),
            known - 0.4 * math.log(0.2),
            known - 0.1 * math.log(0.1) - 0.3 * math.log(0.1),
            0.0,
        ],
        abs=1e-5,
    )
