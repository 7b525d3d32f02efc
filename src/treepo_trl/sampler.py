"""
Grow the trees of many prompts over one engine: Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445).

The levels of one tree wait for each other, trees never do: a tree's next level is submitted as soon as its own last
segment has arrived. Knows no model and no trainer.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .branching import (
    branching_scores,
    draw_initial_branching,
    fallback_stems,
    level_budget,
    split_budget,
    spread_width,
)
from .engines.base import SegmentEngine, SegmentRequest, SegmentResult
from .stopping import extend_text, find_eos, find_match_end, is_repetitive, tokens_until
from .tree import FinishReason, SegmentTree


if TYPE_CHECKING:  # only names the fields; importing it would load the trainer
    from .treepo_config import TreePOConfig


_TAIL_LENGTH = 8  # tokens decoded again in front of a segment: more than any character or merge spans


@dataclass
class SamplingStats:
    """What one call of `TreeSampler.sample` did."""

    num_decoded_tokens: int = 0
    """Tokens that the engine sampled, those cut off behind a stop pattern included."""
    num_segments: int = 0
    """Requests sent to the engine."""
    num_fallback_leaves: int = 0
    """Leaves that a fallback added."""
    seconds: float = 0.0
    """Wall time of the call."""
    engine_seconds: float = 0.0
    """Part of `seconds` spent inside the engine."""


@dataclass
class _GrowingTree:
    """A tree under construction: the level in flight and what the next one needs."""

    tree: SegmentTree
    rng: random.Random
    max_length: int
    """Longest completion of this prompt in tokens."""
    level: list[int | None] = field(default_factory=list[int | None])
    """Parents of the segments in flight, in order of submission."""
    results: dict[int, SegmentResult] = field(default_factory=dict[int, SegmentResult])
    """Results of the level by position in `level`."""
    texts: dict[int | None, str] = field(default_factory=dict[int | None, str])
    """Text of each parent in `level`; only kept where a text rule needs it."""


class TreeSampler:
    """
    Samples one [`SegmentTree`] per prompt with exactly `config.num_generations` leaves each.

    Args:
        engine ([`~treepo_trl.engines.SegmentEngine`]):
            Engine that continues token sequences.
        config ([`TreePOConfig`]):
            Tree shape: `num_generations`, `segment_length`, `max_completion_length`, branching, fallback and stopping
            fields.
        eos_token_ids (`list[int]`):
            Every token that ends a completion.
        decode (`Callable[[list[int]], str]`, *optional*):
            Text of a list of tokens; needed for `stop_pattern` and `stop_repetition`.

    Attributes:
        stats ([`SamplingStats`]):
            Counts and times of the last call of `sample`.

    Raises:
        ValueError: if a text rule is configured and `decode` is missing.
    """

    def __init__(
        self,
        engine: SegmentEngine,
        config: "TreePOConfig",
        eos_token_ids: list[int],
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if decode is None and (config.stop_pattern is not None or config.stop_repetition):
            raise ValueError("`stop_pattern` and `stop_repetition` look at text: pass `decode` to the `TreeSampler`.")
        self.engine = engine
        self.config = config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.decode = decode
        self.stats = SamplingStats()
        self._pattern = None if config.stop_pattern is None else re.compile(config.stop_pattern)
        self._needs_text = self._pattern is not None or config.stop_repetition
        assert config.segment_length is not None, "set by the config"
        self._segment_length = config.segment_length

    def sample(self, prompts: list[list[int]], seed: int | str) -> list[SegmentTree]:
        """
        Sample a tree for each prompt.

        Args:
            prompts (`list[list[int]]`):
                Token ids of the prompts.
            seed (`int` or `str`):
                Seed of every branching and fallback draw. The engine's own sampling is not seeded here; the same seed
                and the same segments give the same trees, whatever the order in which segments arrive.

        Returns:
            `list[SegmentTree]`: one tree per prompt, in the order of the prompts.

        Raises:
            ValueError: if a prompt is empty or leaves no room for a completion in the engine's context.
        """
        self.stats = SamplingStats()
        started = time.perf_counter()
        growing = [
            _GrowingTree(SegmentTree(prompt), random.Random(f"{seed}/{index}"), self._max_length(prompt, index))
            for index, prompt in enumerate(prompts)
        ]
        in_flight: dict[int, tuple[int, int]] = {}  # request id -> (tree, position in its level)
        try:
            self._submit(growing, [(i, self._first_level(grown)) for i, grown in enumerate(growing)], in_flight)
            while in_flight:
                complete: list[int] = []
                for result in self._collect():
                    index, position = in_flight.pop(result.request_id)
                    grown = growing[index]
                    grown.results[position] = result
                    if len(grown.results) == len(grown.level):
                        complete.append(index)
                levels = [(index, self._next_level(growing[index])) for index in complete]
                self._submit(growing, levels, in_flight)
        except BaseException:
            self.engine.abort()
            raise
        self.stats.seconds = time.perf_counter() - started
        return [grown.tree for grown in growing]

    def _max_length(self, prompt: list[int], index: int) -> int:
        if not prompt:
            raise ValueError(
                f"Prompt {index} of this batch is empty: it has no token to continue. Drop empty prompts, or check "
                "how they are tokenized."
            )
        context = self.engine.context_length
        if context is None:
            return self.config.max_completion_length
        room = context - len(prompt)
        if room < 1:
            start = f", which starts with {self.decode(prompt[:32])!r}," if self.decode is not None else ""
            raise ValueError(
                f"Prompt {index} of this batch{start} has {len(prompt)} tokens and leaves no room for a completion in "
                f"the engine's context of {context} tokens. Drop or shorten such prompts, or give the engine a longer "
                "context (`vllm_max_model_length`)."
            )
        return min(self.config.max_completion_length, room)

    def _submit(
        self,
        growing: list[_GrowingTree],
        levels: list[tuple[int, list[int | None]]],
        in_flight: dict[int, tuple[int, int]],
    ) -> None:
        requests: list[SegmentRequest] = []
        for index, parents in levels:
            grown = growing[index]
            grown.level, grown.results = parents, {}
            prefixes = {parent: grown.tree.prompt_ids + grown.tree.completion_ids(parent) for parent in set(parents)}
            for position, parent in enumerate(parents):
                request_id = self.stats.num_segments
                self.stats.num_segments += 1
                length = 0 if parent is None else grown.tree.nodes[parent].end
                max_tokens = min(self._segment_length, grown.max_length - length)
                requests.append(SegmentRequest(request_id, prefixes[parent], max_tokens))
                in_flight[request_id] = (index, position)
        if requests:
            started = time.perf_counter()
            self.engine.submit(requests)
            self.stats.engine_seconds += time.perf_counter() - started

    def _collect(self) -> list[SegmentResult]:
        started = time.perf_counter()
        results = self.engine.collect()
        self.stats.engine_seconds += time.perf_counter() - started
        self.stats.num_decoded_tokens += sum(len(result.token_ids) for result in results)
        return results

    def _first_level(self, grown: _GrowingTree) -> list[int | None]:
        config = self.config
        assert config.initial_branching_factor is not None, "set by the config"
        initial = draw_initial_branching(config.initial_branching_factor, config.num_generations, grown.rng)
        if self._needs_text:
            grown.texts[None] = ""
        return [None] * initial

    def _next_level(self, grown: _GrowingTree) -> list[int | None]:
        """Store the level that has arrived and decide the next one; an empty one when the tree is done."""
        config, tree = self.config, grown.tree
        live: list[int] = []
        texts: dict[int | None, str] = {}
        for position, parent in enumerate(grown.level):
            node, text = self._store(grown, parent, grown.results[position])
            if tree.nodes[node].finish_reason is None:
                live.append(node)
                texts[node] = text
        num_finished = len(tree.leaves)
        if not live:
            return self._fall_back(grown)
        grown.texts = texts
        total = level_budget(
            len(live), num_finished, len(grown.level) - len(live), config.num_generations, config.branching_factor
        )
        if config.branch_schedule == "spread":
            depth = tree.nodes[live[0]].depth + 1
            width = spread_width(depth, config.max_tree_depth, config.num_generations)
            total = max(min(total, width - num_finished), len(live))
        segment_logprobs = [tree.nodes[node].logprobs or [] for node in live]
        scores = branching_scores(config.branching_policy, segment_logprobs)
        counts = split_budget(total, scores, grown.rng, config.branching_temperature)
        return [node for node, count in zip(live, counts, strict=True) for _ in range(count)]

    def _fall_back(self, grown: _GrowingTree) -> list[int | None]:
        config = self.config
        num_missing = config.num_generations - len(grown.tree.leaves)
        if num_missing == 0:
            return []
        stems = fallback_stems(grown.tree, num_missing, config.branching_factor, config.fallback_policy, grown.rng)
        self.stats.num_fallback_leaves += len(stems)  # nothing branches any more: one leaf each
        if self._needs_text:
            assert self.decode is not None, "checked at construction"
            grown.texts = {stem: self.decode(grown.tree.completion_ids(stem)) for stem in set(stems)}
        return stems

    def _store(self, grown: _GrowingTree, parent: int | None, result: SegmentResult) -> tuple[int, str]:
        """Add a segment to the tree, cut where its path ends; returns the node and, if needed, the path's text."""
        token_ids, logprobs = result.token_ids, result.logprobs
        reason: FinishReason | None = None
        eos = find_eos(token_ids, self.eos_token_ids)
        if eos is not None:
            token_ids, logprobs, reason = token_ids[: eos + 1], logprobs[: eos + 1], "stop"
        text = ""
        if self._needs_text:
            token_ids, text_reason, text = self._apply_text_rules(grown, parent, token_ids, reason)
            logprobs, reason = logprobs[: len(token_ids)], text_reason or reason
        end = len(token_ids) + (0 if parent is None else grown.tree.nodes[parent].end)
        if reason is None and end >= grown.max_length:
            reason = "length"
        return grown.tree.add(parent, token_ids, logprobs, reason), text

    def _apply_text_rules(
        self, grown: _GrowingTree, parent: int | None, token_ids: list[int], reason: FinishReason | None
    ) -> tuple[list[int], FinishReason | None, str]:
        decode = self.decode
        assert decode is not None, "checked at construction"
        parent_text = grown.texts[parent]
        tail_ids = grown.tree.tail_ids(parent, _TAIL_LENGTH)

        def text_after(ids: list[int]) -> str:
            return extend_text(parent_text, tail_ids, ids, decode)

        text = text_after(token_ids)
        match_end = None if self._pattern is None else find_match_end(self._pattern, text)
        if match_end is not None:
            kept = tokens_until(match_end, token_ids, text_after)
            # A match that the EOS token follows directly is an ordinary end.
            if reason is None or kept < len(token_ids) - 1:
                return token_ids[:kept], "pattern", text
        if reason is None and self.config.stop_repetition and is_repetitive(text):
            return token_ids, "repetition", text
        return token_ids, None, text
