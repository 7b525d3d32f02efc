"""Where a path ends in a segment that has arrived: at an EOS token, at a text rule, or at the longest length."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from treepo_trl.engines.base import SegmentResult

from .config import TreeSamplingConfig
from .nodes import FinishReason
from .stopping import find_eos, find_match_end, is_repetitive, join_text, matching_tail, text_change, tokens_until
from .tree import SegmentTree


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


@dataclass(frozen=True, slots=True)
class CutSegment:
    """What is kept of a segment."""

    token_ids: list[int]
    logprobs: list[float]
    entropy: float | None
    """Mean of its tokens, in nats."""
    finish_reason: FinishReason | None
    """Why its path ends; `None` if it goes on."""
    change: tuple[int, str] | None
    """How it changes the text of its turn, where a rule looks at text."""


@dataclass
class SegmentCutter:
    """Cuts the segments of one tree. Text rules see the text of the turn that a segment belongs to."""

    rules: TreeRules
    tree: SegmentTree
    max_length: int
    """Longest completion in tokens."""
    _changes: dict[int, tuple[int, str]] = field(default_factory=dict[int, tuple[int, str]])
    """How each node changes the text of its turn."""
    _parent_texts: dict[int | None, str] = field(default_factory=dict[int | None, str])

    def cut(self, parent: int | None, result: SegmentResult) -> CutSegment:
        """What is kept of a segment below `parent`."""
        token_ids, logprobs = result.token_ids, result.logprobs
        reason: FinishReason | None = None
        eos = find_eos(token_ids, self.rules.eos_token_ids)
        if eos is not None:
            token_ids, logprobs, reason = token_ids[: eos + 1], logprobs[: eos + 1], "stop"
        change: tuple[int, str] | None = None
        if self.rules.needs_text:
            num_kept, text_reason, change = self._apply_text_rules(parent, token_ids, reason)
            token_ids, logprobs, reason = token_ids[:num_kept], logprobs[:num_kept], text_reason or reason
        end = 0 if parent is None else self.tree.nodes[parent].end
        if reason is None and end + len(token_ids) >= self.max_length:
            reason = "length"
        entropies = result.entropies[: len(token_ids)] if result.entropies else None
        entropy = sum(entropies) / len(entropies) if entropies else None
        return CutSegment(token_ids, logprobs, entropy, reason, change)

    def keep(self, node: int, segment: CutSegment) -> None:
        """Remember the text of a node that its turn may be continued from."""
        if segment.finish_reason is None and segment.change is not None:
            self._changes[node] = segment.change

    def next_level(self) -> None:
        """Forget what only segments of one level need."""
        self._parent_texts = {}

    def forget(self) -> None:
        """Forget all texts: the tree is done."""
        self._changes, self._parent_texts = {}, {}

    def _text_before(self, parent: int | None) -> str:
        """Text of the turn up to and including `parent`; one for all its children."""
        text = self._parent_texts.get(parent)
        if text is None:
            start = self.tree.turn_start(parent)
            path = self.tree.path(parent)
            turn = path if start is None else path[path.index(start) + 1 :]
            text = self._parent_texts[parent] = join_text(self._changes[node] for node in turn)
        return text

    def _apply_text_rules(
        self, parent: int | None, token_ids: list[int], reason: FinishReason | None
    ) -> tuple[int, FinishReason | None, tuple[int, str]]:
        """Number of tokens to keep, why the path ends by its text if it does, and the change of the turn's text."""
        decode, pattern = self.rules.decode, self.rules.config.stop_pattern
        assert decode is not None, "checked at construction"
        parent_text = self._text_before(parent)
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
