"""
What the sampler asks where a model's turn has ended: whether something answers it, and with which tokens.

A path whose turn is answered goes on behind the answer. Answers come from threads while other paths are decoded. Node
ids do not depend on when they come: a tree advances when all segments and all answers of its level are there.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from .nodes import FinishReason, Message
from .tree import SegmentTree


@dataclass(frozen=True)
class TurnEnd:
    """A turn that has ended in an EOS token. Its last segment is not in the tree yet."""

    index: int
    """Number of the prompt."""
    tree: SegmentTree
    parent: int | None
    """Node that the last segment continues; `None` for the prompt."""
    token_ids: list[int]
    """Tokens of the last segment, up to the EOS token."""
    room: int
    """Completion tokens that the path may still have."""

    @property
    def num_turns(self) -> int:
        """Answers that the path has already."""
        return 0 if self.parent is None else self.tree.nodes[self.parent].num_turns

    def split(self) -> tuple[list[int], list[int]]:
        """Tokens before the turn, prompt included, and tokens of the turn."""
        before = self.tree.sequence_ids(self.tree.turn_start(self.parent))
        return before, self.tree.sequence_ids(self.parent)[len(before) :] + self.token_ids


@dataclass
class Answer:
    """How a turn is answered."""

    token_ids: list[int] = field(default_factory=list[int])
    """Tokens to append, up to where the model goes on; empty if the path ends."""
    messages: list[Message] = field(default_factory=list[Message])
    """Messages of these tokens."""
    turn_message: Message | None = None
    """The turn itself, as a message."""
    finish_reason: FinishReason = "stop"
    """Why the path ends, where it does."""
    num_calls: int = 0
    """Tool calls that were executed."""
    num_failures: int = 0
    """Those of them that failed."""


class PendingAnswer(Protocol):
    """An answer that may not be there yet."""

    @property
    def future(self) -> Future[object]:
        """Done when the answer is there."""
        ...

    def result(self) -> Answer:
        """The answer; called once, in the thread of the sampler, when the future is done."""
        ...


class TurnHandler(Protocol):
    """Answers the turns of one call of `TreeSampler.sample`. All methods are called in its thread."""

    def may_branch(self, index: int) -> bool:
        """Whether paths of a tree may part at all behind its prompt."""
        ...

    def begin(self, end: TurnEnd) -> PendingAnswer | None:
        """Start to answer a turn; `None` if its path just ends."""
        ...

    def stored(self, index: int, node: int, answer: Answer) -> None:
        """Told the node of the segment that an answer belongs to, once both are in the tree."""
        ...

    def abort(self) -> None:
        """Give up what is running: the call of `sample` has failed."""
        ...
