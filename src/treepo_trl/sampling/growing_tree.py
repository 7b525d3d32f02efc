"""
One tree under construction: which segments it asks for next, and what becomes of those that arrive.

Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445) for a single prompt. Knows no engine and no other
tree.
"""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from treepo_trl.engines.base import SegmentResult

from .branching import (
    SCHEDULES,
    annealed,
    branching_scores,
    draw_initial_branching,
    fallback_stems,
    level_budget,
    split_budget,
)
from .cutting import CutSegment, SegmentCutter, TreeRules
from .tree import SegmentTree
from .turns import Answer, PendingAnswer, TurnEnd, TurnHandler
from .widths import heaviest_first


@dataclass
class GrowingTree:
    """
    A tree and the level of segments that it waits for.

    The levels of a tree wait for each other: `advance` is called when every segment of the level has arrived, and the
    answer to every turn that ended in it. The tree is done when the level is empty.
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
    index: int = 0
    """Number of the prompt."""
    turns: TurnHandler | None = None
    """Answers turns; without it a path ends with its first."""
    level: list[int | None] = field(default_factory=list[int | None])
    """Parents of the level's segments."""
    num_taken: int = 0
    """Segments of the level that were handed out to be sampled."""
    num_levels: int = 0
    """Levels so far: segments that were decoded one after the other."""
    num_fallback_leaves: int = 0
    """Leaves that a fallback asked for."""
    num_decoded_tokens: int = 0
    """Tokens that were sampled for this tree, those cut off behind a stop pattern included."""
    num_answer_tokens: int = 0
    """Tokens of answers."""
    pending: dict[int, PendingAnswer] = field(default_factory=dict[int, PendingAnswer])
    """Position in the level -> what answers the turn that ended there."""
    _max_tokens: int = 0
    _wave: int = 0
    """Fallbacks so far."""
    _weights: dict[int | None, float] = field(default_factory=lambda: {None: 1.0})
    """Weight of the nodes before the first fallback."""
    _prefixes: dict[int | None, list[int]] = field(default_factory=dict[int | None, list[int]])
    _arrived: dict[int, CutSegment] = field(default_factory=dict[int, CutSegment])

    def __post_init__(self) -> None:
        self._cutter = SegmentCutter(self.rules, self.tree, self.max_length)

    def start(self) -> None:
        """Ask for the first level."""
        config = self.rules.config
        initial = draw_initial_branching(config.first_width, config.num_generations, self.rng)
        if self.widths is not None:
            initial = min(max(self._rounded(self.widths[0]), 2), config.num_generations)
        if not self._may_branch:
            initial = config.num_generations
        if config.max_tree_tokens is not None:
            initial = max(min(initial, config.max_tree_tokens // self._expected_rest(None)), 1)
        self._ask_for([None] * initial)

    @property
    def _may_branch(self) -> bool:
        """Whether paths may part behind the prompt."""
        return self.turns is None or self.turns.may_branch(self.index)

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

    def receive(self, position: int, result: SegmentResult) -> None:
        """Keep what counts of an arrived segment; a turn that ends with it is answered from now on."""
        parent = self.level[position]
        segment = self._arrived[position] = self._cutter.cut(parent, result)
        self.num_decoded_tokens += len(result.token_ids)
        if self.turns is not None and segment.finish_reason == "stop":
            room = self.max_length - self._end(parent) - len(segment.token_ids)
            pending = self.turns.begin(TurnEnd(self.index, self.tree, parent, segment.token_ids, room))
            if pending is not None:
                self.pending[position] = pending

    @property
    def has_arrived(self) -> bool:
        """Whether all segments of the level are there; answers may be missing."""
        return len(self._arrived) == len(self.level)

    @property
    def is_complete(self) -> bool:
        """Whether all of the level is there, answers included."""
        return self.has_arrived and all(pending.future.done() for pending in self.pending.values())

    def advance(self) -> int:
        """Store the complete level and decide the next one; returns the number of paths that ended."""
        tree = self.tree
        self.num_levels += 1
        num_leaves = len(tree.leaves)
        counts = Counter(self.level)
        nodes = [self._store(position) for position in range(len(self.level))]
        for node, parent in zip(nodes, self.level, strict=True):
            self._weights[node] = self._weights[parent] / counts[parent]
        live = [node for node in nodes if tree.nodes[node].finish_reason is None]
        if live and self._tokens_left() < len(live):
            for node in live:
                tree.finish(node, "length")
            live = []
        if live:
            children = self._children(self._segments_of(live), self._level_size(live, len(nodes) - len(live)))
            self._ask_for([node for node, count in zip(live, children, strict=True) for _ in range(count)])
        else:
            self._ask_for(self._fall_back())
        return len(tree.leaves) - num_leaves

    def _store(self, position: int) -> int:
        """Add a segment to the tree, and what answers it; returns the node where the path goes on or ends."""
        parent, segment, pending = self.level[position], self._arrived[position], self.pending.get(position)
        answer = None if pending is None else pending.result()
        reason = segment.finish_reason
        if answer is not None:
            reason = None if answer.token_ids else answer.finish_reason
        node = self.tree.add(parent, segment.token_ids, segment.logprobs, reason, segment.entropy, self._wave)
        self._cutter.keep(node, segment)
        return node if answer is None else self._answer(node, answer)

    def _answer(self, node: int, answer: Answer) -> int:
        """Add the answer to a segment; returns the node where the path goes on or ends."""
        tree, assigned = self.tree, self.tree.nodes[node]
        assigned.num_calls, assigned.num_failures = answer.num_calls, answer.num_failures
        if answer.turn_message is not None:
            assigned.messages = (answer.turn_message,)
        last = node
        if answer.token_ids:
            last = tree.add(node, answer.token_ids, wave=assigned.wave, is_sampled=False)
            tree.nodes[last].messages = tuple(answer.messages)
            self.num_answer_tokens += len(answer.token_ids)
        assert self.turns is not None, "it has given the answer"
        self.turns.stored(self.index, node, answer)
        return last

    def _segments_of(self, live: list[int]) -> list[int]:
        """The last segment of each path, which may end in an answer, with the path's weight."""
        segments: list[int] = []
        for node in live:
            parent = self.tree.nodes[node].parent
            if not self.tree.nodes[node].is_sampled and parent is not None:
                self._weights[parent] = self._weights[node]
                node = parent
            segments.append(node)
        return segments

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
        if self.num_fallback_leaves or not self._may_branch:
            return len(live)  # each of these paths stands for one leaf
        size = config.num_generations - num_finished
        if self.widths is not None:
            width = self.widths[min(nodes[live[0]].depth + 1, len(self.widths) - 1)]
            size = min(size, self._rounded(width * sum(self._weights[node] for node in live)))
        else:
            budget = level_budget(
                len(live), num_finished, num_finished_now, config.num_generations, config.branching_factor
            )
            expected = self.max_length if self.expected_length is None else min(self.expected_length, self.max_length)
            most_open = SCHEDULES[config.branch_schedule].most_open
            end = min(nodes[node].sampled_end for node in live) + self._segment_length
            size = min(budget, most_open(end, expected, config.num_generations) - num_finished)
        if config.max_tree_tokens is not None:
            size = min(size, self._tokens_left() // max(self._expected_rest(node) for node in live))
        return max(size, len(live))

    def _ask_for(self, parents: list[int | None]) -> None:
        self.level, self.num_taken, self._arrived, self.pending = parents, 0, {}, {}
        self._cutter.next_level()
        if parents:
            self._max_tokens = min(self._segment_length, self._tokens_left() // len(parents))
        else:
            self._cutter.forget()

    def _fall_back(self) -> list[int | None]:
        config = self.rules.config
        num_missing = config.num_generations - len(self.tree.leaves)
        if num_missing == 0:
            return []
        stems = fallback_stems(
            self.tree,
            num_missing,
            config.branching_factor,
            "root" if config.fallback_policy != "none" and not self._may_branch else config.fallback_policy,
            self.rng,
            config.fallback_candidates,
        )
        if config.max_tree_tokens is not None:
            left, affordable = self._tokens_left(), 0
            for stem in stems:
                left -= self._expected_rest(stem)
                affordable += left >= 0
            stems = stems[:affordable]
        self.num_fallback_leaves += len(stems)
        self._wave += 1
        return stems

    # Lengths and budgets

    def working_tokens(self) -> int:
        """Tokens of the prompt, of segments and answers, and of the level (before the start: of the first one)."""
        num_segments = len(self.level) or (
            self.rules.config.first_width[-1] if self.widths is None else round(self.widths[0])
        )
        num_tokens = len(self.tree.prompt_ids) + self.num_decoded_tokens + self.num_answer_tokens
        return num_tokens + num_segments * self._segment_length

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

    def _expected_rest(self, node: int | None) -> int:
        """Tokens that can be expected to be sampled still on a path that ends at a node; answers cost nothing."""
        nodes, leaves = self.tree.nodes, self.tree.leaves
        sampled = 0 if node is None else nodes[node].sampled_end
        if leaves:
            rest = sum(nodes[leaf].sampled_end for leaf in leaves) // len(leaves) - sampled
        elif self.expected_length is not None:
            rest = self.expected_length - sampled
        else:
            rest = sampled + self._segment_length  # as long again as so far
        return min(max(rest, self._segment_length), max(self.max_length - self._end(node), 1))
