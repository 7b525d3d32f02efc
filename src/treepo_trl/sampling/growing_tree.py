"""
One tree under construction: which segments it asks for next, and what becomes of those that arrive.

Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445) for a single prompt. Knows no engine and no other
tree.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from treepo_trl.engines.base import SegmentResult

from .branching import (
    SCHEDULED_WIDTH,
    annealed,
    branching_scores,
    draw_initial_branching,
    fallback_stems,
    level_budget,
    split_budget,
)
from .config import TreeSamplingConfig
from .stopping import (
    find_eos,
    find_match_end,
    is_repetitive,
    join_text,
    matching_tail,
    text_change,
    tokens_until,
)
from .tree import FinishReason, SegmentTree
from .widths import heaviest_first


@dataclass(frozen=True)
class TreeRules:
    """What holds for every tree of a sampler."""

    config: TreeSamplingConfig
    eos_token_ids: frozenset[int]
    decode: Callable[[list[int]], str] | None
    """Text of a list of tokens; `None` where no rule looks at text."""

    @property
    def needs_text(self) -> bool:
        """Whether a rule looks at text."""
        return self.config.stop_pattern is not None or self.config.stop_repetition


@dataclass
class GrowingTree:
    """
    A tree and the level of segments that it waits for.

    The levels of a tree wait for each other: `advance` is called when every segment of the level has arrived. The
    tree is done when the level is empty.
    """

    rules: TreeRules
    tree: SegmentTree
    rng: random.Random
    max_length: int
    """Longest completion of this prompt in tokens."""
    expected_length: int | None = None
    """Expected length of a completion in tokens, if anything is known about it."""
    progress: float = 0.0
    """Fraction of the training that is done, for the branching temperature."""
    block_size: int | None = None
    """Tokens per block of the engine's prefix cache."""
    widths: Sequence[float] | None = None
    """Paths per unit of leaf weight at each depth, where the schedule sets them."""
    level: list[int | None] = field(default_factory=list[int | None])
    """Parents of the level's segments."""
    num_taken: int = 0
    """Segments of the level that were handed out to be sampled."""
    num_fallback_leaves: int = 0
    """Leaves that a fallback asked for."""
    num_decoded_tokens: int = 0
    """Tokens that were sampled for this tree, those cut off behind a stop pattern included."""
    _max_tokens: int = 0
    _wave: int = 0
    """Fallbacks so far."""
    _weights: dict[int | None, float] = field(default_factory=lambda: {None: 1.0})
    """Weight of the nodes before the first fallback."""
    _prefixes: dict[int | None, list[int]] = field(default_factory=dict[int | None, list[int]])
    _results: dict[int, SegmentResult] = field(default_factory=dict[int, SegmentResult])
    _texts: dict[int, tuple[int, str]] = field(default_factory=dict[int, tuple[int, str]])
    """How each node changes the path's text; only kept where a text rule needs it."""

    def start(self) -> None:
        """Ask for the first level."""
        config = self.rules.config
        initial = draw_initial_branching(config.first_width, config.num_generations, self.rng)
        if self.widths is not None:
            initial = min(max(self._rounded(self.widths[0]), 2), config.num_generations)
        if config.max_tree_tokens is not None:
            initial = max(min(initial, config.max_tree_tokens // self._expected_rest(0)), 1)
        self._ask_for([None] * initial)

    def take(self) -> tuple[int, list[int], int]:
        """Position, tokens to continue, and longest length of the next segment of the level to be sampled."""
        position = self.num_taken
        parent = self.level[position]
        self.num_taken += 1
        prefix = self._prefixes.get(parent)
        if prefix is None:  # one list for all children of a node
            prefix = self._prefixes[parent] = self.tree.sequence_ids(parent)
        if self.num_taken == len(self.level):
            self._prefixes = {}
        return position, prefix, self._segment_tokens(len(prefix), self.max_length - self._end(parent))

    def _segment_tokens(self, num_before: int, room: int) -> int:
        """
        Longest next segment of a sequence of `num_before` tokens.

        A segment that will be continued ends one token behind a block of the engine's cache, if that takes no more
        than half of it: the last token of a sequence is not in the cache yet, so a child then starts with exactly this
        one token to compute, as any decoding step does. From another end it would compute up to a block again.
        """
        num_tokens = min(self._max_tokens, room)
        if self.block_size is None or num_tokens == room:
            return num_tokens
        surplus = (num_before + num_tokens - 1) % self.block_size
        return num_tokens - surplus if surplus <= num_tokens // 2 else num_tokens

    def receive(self, position: int, result: SegmentResult) -> bool:
        """Keep an arrived segment; whether the level is complete with it."""
        self._results[position] = result
        self.num_decoded_tokens += len(result.token_ids)
        return len(self._results) == len(self.level)

    def advance(self) -> int:
        """Store the complete level and decide the next one; returns the number of paths that ended."""
        tree = self.tree
        num_leaves = len(tree.leaves)
        parent_texts: dict[int | None, str] = {}
        if self.rules.needs_text:
            parent_texts = {
                parent: join_text(self._texts[node] for node in tree.path(parent)) for parent in set(self.level)
            }
        nodes = [
            self._store(parent, self._results[i], parent_texts.get(parent, "")) for i, parent in enumerate(self.level)
        ]
        counts = Counter(self.level)
        for node, parent in zip(nodes, self.level, strict=True):
            self._weights[node] = self._weights[parent] / counts[parent]
        live = [node for node in nodes if tree.nodes[node].finish_reason is None]
        if live and self._tokens_left() < len(live):
            for node in live:
                tree.finish(node, "length")
            live = []
        if live:
            children = self._children(live, self._level_size(live, len(nodes) - len(live)))
            self._ask_for([node for node, count in zip(live, children, strict=True) for _ in range(count)])
        else:
            self._ask_for(self._fall_back())
        return len(tree.leaves) - num_leaves

    def _children(self, live: list[int], total: int) -> list[int]:
        """How many of the next level's segments each live path gets."""
        config = self.rules.config
        scores = branching_scores(config.branching_policy, [self.tree.nodes[node] for node in live])
        if scores is None:
            return heaviest_first([self._weights[node] for node in live], total, self.rng)
        temperature = annealed(config.branching_temperature, config.branching_temperature_end, self.progress)
        return split_budget(total, scores, self.rng, temperature)

    def _rounded(self, size: float) -> int:
        """A whole number whose mean is `size`."""
        return int(size + self.rng.random())

    def _level_size(self, live: list[int], num_finished_now: int) -> int:
        """Segments of the next level, at least one for each live path."""
        config, nodes, num_finished = self.rules.config, self.tree.nodes, len(self.tree.leaves)
        if self.num_fallback_leaves:
            return len(live)  # each of these paths stands for one missing leaf
        size = config.num_generations - num_finished
        if self.widths is not None:
            width = self.widths[min(nodes[live[0]].depth + 1, len(self.widths) - 1)]
            size = min(size, self._rounded(width * sum(self._weights[node] for node in live)))
        else:
            budget = level_budget(
                len(live), num_finished, num_finished_now, config.num_generations, config.branching_factor
            )
            expected = self.max_length if self.expected_length is None else min(self.expected_length, self.max_length)
            scheduled_width = SCHEDULED_WIDTH[config.branch_schedule]
            end = nodes[live[0]].end + self._segment_length
            size = min(budget, scheduled_width(end, expected, config.num_generations) - num_finished)
        if config.max_tree_tokens is not None:
            size = min(size, self._tokens_left() // max(self._expected_rest(nodes[node].end) for node in live))
        return max(size, len(live))

    def _ask_for(self, parents: list[int | None]) -> None:
        self.level, self.num_taken, self._results = parents, 0, {}
        if parents:
            self._max_tokens = min(self._segment_length, self._tokens_left() // len(parents))
        else:
            self._texts = {}  # nothing asks for them any more

    def _fall_back(self) -> list[int | None]:
        config = self.rules.config
        num_missing = config.num_generations - len(self.tree.leaves)
        if num_missing == 0:
            return []
        stems = fallback_stems(
            self.tree,
            num_missing,
            config.branching_factor,
            config.fallback_policy,
            self.rng,
            config.fallback_candidates,
        )
        if config.max_tree_tokens is not None:
            left, affordable = self._tokens_left(), 0
            for stem in stems:
                left -= self._expected_rest(self._end(stem))
                affordable += left >= 0
            stems = stems[:affordable]
        self.num_fallback_leaves += len(stems)
        self._wave += 1
        return stems

    # Lengths and budgets

    def working_tokens(self) -> int:
        """Tokens of the prompt, of what was sampled, and of the level (before the start: of the first one)."""
        num_segments = len(self.level) or (
            self.rules.config.first_width[-1] if self.widths is None else round(self.widths[0])
        )
        return len(self.tree.prompt_ids) + self.num_decoded_tokens + num_segments * self._segment_length

    def _end(self, node: int | None) -> int:
        return 0 if node is None else self.tree.nodes[node].end

    def _tokens_left(self) -> int:
        """Tokens that may still be decoded for this tree."""
        budget = self.rules.config.max_tree_tokens
        return sys.maxsize if budget is None else budget - self.num_decoded_tokens

    @property
    def _segment_length(self) -> int:
        segment_length = self.rules.config.segment_length
        assert segment_length is not None, "set by the config"
        return segment_length

    def _expected_rest(self, end: int) -> int:
        """Tokens that a path of `end` tokens can be expected to need still."""
        if self.tree.leaves:
            rest = self.tree.num_leaf_tokens // len(self.tree.leaves) - end
        elif self.expected_length is not None:
            rest = self.expected_length - end
        else:
            rest = end + self._segment_length  # as long again as so far
        return min(max(rest, self._segment_length), max(self.max_length - end, 1))

    # What arrived

    def _store(self, parent: int | None, result: SegmentResult, parent_text: str) -> int:
        """Add a segment to the tree, cut where its path ends; returns the node."""
        token_ids, logprobs = result.token_ids, result.logprobs
        reason: FinishReason | None = None
        eos = find_eos(token_ids, self.rules.eos_token_ids)
        if eos is not None:
            token_ids, logprobs, reason = token_ids[: eos + 1], logprobs[: eos + 1], "stop"
        change: tuple[int, str] | None = None
        if self.rules.needs_text:
            num_kept, text_reason, change = self._apply_text_rules(parent, token_ids, parent_text, reason)
            token_ids, logprobs, reason = token_ids[:num_kept], logprobs[:num_kept], text_reason or reason
        if reason is None and self._end(parent) + len(token_ids) >= self.max_length:
            reason = "length"
        entropies = result.entropies[: len(token_ids)] if result.entropies else None
        entropy = sum(entropies) / len(entropies) if entropies else None
        node = self.tree.add(parent, token_ids, logprobs, reason, entropy, self._wave)
        if reason is None and change is not None:  # leaves are never continued
            self._texts[node] = change
        return node

    def _apply_text_rules(
        self, parent: int | None, token_ids: list[int], parent_text: str, reason: FinishReason | None
    ) -> tuple[int, FinishReason | None, tuple[int, str]]:
        """Number of tokens to keep, why the path ends by its text if it does, and the change of the path's text."""
        decode, pattern = self.rules.decode, self.rules.config.stop_pattern
        assert decode is not None, "checked at construction"
        tail_ids = matching_tail(parent_text, partial(self.tree.tail_ids, parent), decode)

        def text_after(ids: list[int]) -> str:
            num_dropped, added = text_change(parent_text, tail_ids, ids, decode)
            return parent_text[: len(parent_text) - num_dropped] + added

        change = text_change(parent_text, tail_ids, token_ids, decode)
        text = parent_text[: len(parent_text) - change[0]] + change[1]
        match_end = None if pattern is None else find_match_end(pattern, text)
        if match_end is not None:
            kept = tokens_until(match_end, token_ids, text_after)
            # A match that the EOS token follows directly is an ordinary end.
            if reason is None or kept < len(token_ids) - 1:
                return kept, "pattern", change
        if reason is None and self.rules.config.stop_repetition and is_repetitive(text):
            return len(token_ids), "repetition", change
        return len(token_ids), None, change
