"""Configs, prompts and decoders for tests of the sampler, and the strategies that its laws are tried on."""

import json
import random
from collections.abc import Callable
from typing import Any, get_args

from hypothesis import strategies as st

from tests.support.fakes import EOS
from treepo_trl.engines import SegmentEngine
from treepo_trl.sampling import SegmentTree, TreeSampler, TreeSamplingConfig
from treepo_trl.sampling.branching import BranchingPolicy, BranchSchedule, FallbackCandidates, FallbackPolicy


def make_config(width: int = 4, **changes: Any) -> TreeSamplingConfig:
    """A tree as in the paper: every level is full as soon as it can be."""
    values = {
        "num_generations": width,
        "branch_schedule": "early",
        "fallback_policy": "random",
        "branching_factor": min(width, 2),
        "max_completion_length": 12,
        "segment_length": 3,
        "stop_repetition": False,
        **changes,
    }
    return TreeSamplingConfig(**values)


def prompts_of(count: int, length: int = 3) -> list[list[int]]:
    """Distinct prompts of the same length, so that a request names its tree."""
    return [[100 + i] * length for i in range(count)]


def trees_of(
    engine: SegmentEngine, config: TreeSamplingConfig, prompts: int | list[list[int]] = 3, **options: Any
) -> list[SegmentTree]:
    """The trees of given prompts, or of as many of `prompts_of`."""
    prompts = prompts_of(prompts) if isinstance(prompts, int) else prompts
    return TreeSampler(engine, config, [EOS]).sample(prompts, **{"seed": 0, **options})


def tree_of(
    engine: SegmentEngine,
    width: int = 4,
    *,
    prompt: tuple[int, ...] = (7,),
    decode: Callable[[list[int]], str] | None = None,
    **changes: Any,
) -> SegmentTree:
    """The tree of one prompt."""
    (tree,) = TreeSampler(engine, make_config(width, **changes), [EOS], decode).sample([list(prompt)], seed=0)
    return tree


def completions(tree: SegmentTree) -> list[list[int]]:
    return [tree.completion_ids(leaf) for leaf in tree.leaves]


def reasons(tree: SegmentTree) -> list[str | None]:
    """Why each leaf's path ended."""
    return [tree.nodes[leaf].finish_reason for leaf in tree.leaves]


def fingerprint(trees: list[SegmentTree]) -> str:
    return json.dumps([tree.to_dict() for tree in trees])


def decode_words(ids: list[int]) -> str:
    """Writes token 7 as <7>, so that texts are easy to write by hand."""
    return "".join(f"<{i}>" for i in ids)


def decode_bytes(ids: list[int]) -> str:
    """Byte-level decoding as in GPT-2-like tokenizers: one U+FFFD per incomplete character. EOS has no text."""
    return bytes(i for i in ids if i != EOS).decode("utf-8", errors="replace")


def decode_byte_fallback(ids: list[int]) -> str:
    """SentencePiece's byte fallback: one U+FFFD per byte of a run that is no UTF-8; ASCII splits runs."""
    text, run = "", b""
    for byte in [*[i for i in ids if i != EOS], None]:
        if byte is not None and byte >= 128:
            run += bytes([byte])
            continue
        try:
            text += run.decode("utf-8")
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        text, run = text + ("" if byte is None else chr(byte)), b""
    return text


@st.composite
def configs(draw: st.DrawFn) -> TreeSamplingConfig:
    """Every shape that ends with all leaves: fallback `none` is left out."""
    width = draw(st.integers(1, 16))
    segment_length = draw(st.integers(1, 6))
    low = draw(st.integers(1, width))
    schedule = draw(st.sampled_from(get_args(BranchSchedule)))
    has_own_widths = schedule == "sqrt"
    fallback = draw(st.sampled_from([policy for policy in get_args(FallbackPolicy) if policy != "none"]))
    initial = draw(st.sampled_from([None, [low, low], [low, draw(st.integers(low, width))]]))
    return make_config(
        width=width,
        branching_factor=draw(st.integers(1, min(width, 2) if has_own_widths else width)),
        segment_length=segment_length,
        max_completion_length=draw(st.integers(segment_length, 30)),
        initial_branching_factor=None if has_own_widths else initial,
        branching_policy=draw(st.sampled_from(get_args(BranchingPolicy))),
        branching_temperature=draw(st.sampled_from([0.01, 2.0, 50.0])),
        branching_temperature_end=draw(st.sampled_from([None, 0.5])),
        branch_schedule=schedule,
        fallback_policy=fallback,
        fallback_candidates="finished" if fallback == "root" else draw(st.sampled_from(get_args(FallbackCandidates))),
    )


@st.composite
def limits(draw: st.DrawFn) -> dict[str, Any]:
    """Slots and cache of an engine, small ones included."""
    return {
        "slots": draw(st.sampled_from([None, 1, 2, 7, 40])),
        "num_cache_tokens": draw(st.sampled_from([None, 1, 50, 400])),
        "block_size": draw(st.sampled_from([None, 1, 2, 5])),
        "reports_entropies": True,
    }


stop_probabilities = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.8, 1.0])
arrivals = st.none() | st.integers(0, 99)


def arrival(seed: int | None) -> random.Random | None:
    return None if seed is None else random.Random(seed)
