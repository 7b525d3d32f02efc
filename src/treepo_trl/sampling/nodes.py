"""A node of a tree, in memory and in a file. Standard library only."""

from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, get_args

from .json_lines import COUNT, FLAG, NUMBER, OBJECT, Kind, check_fields, check_list, check_value, or_null


TokenReason = Literal["stop", "pattern", "repetition", "length"]
"""An EOS token, the stop pattern, a repetition, or the cap on a path's length or on the tree's tokens."""
AnswerReason = Literal["turns", "overlong", "timeout"]
"""A call that may not be made any more, an answer that does not fit, or one that did not come in time."""
FinishReason = Literal[TokenReason, AnswerReason]
"""Why a path ended."""

Message = dict[str, Any]
"""A message of a conversation, as chat templates take it."""


@dataclass(slots=True)
class SegmentNode:
    """
    One segment of a tree: the tokens between two branching points.

    Or the answer to a segment that has called tools: tokens that were appended and not sampled.
    """

    parent: int | None
    """Node id of the parent; `None` for a child of the root (the prompt)."""
    token_ids: tuple[int, ...]  # not a list: the garbage collector would visit every token again and again
    """Tokens added by this node, never empty."""
    logprobs: tuple[float, ...] | None = None
    """
    Log-probability of each token under the distribution it was sampled from; `None` if the engine gave none, and for
    answers.
    """
    finish_reason: FinishReason | None = None
    """Why the path ended here; `None` for an inner node."""
    entropy: float | None = None
    """Mean entropy in nats of the distributions that the tokens were drawn from; `None` if the engine gave none."""
    depth: int = 0
    """Segments above this one: 0 for a child of the root. An answer has the depth of its segment."""
    end: int = 0
    """Completion tokens on the path up to and including this node."""
    wave: int = 0
    """0, or the number of the fallback that asked for the path."""
    sampled_end: int = 0
    """Those of them that were sampled."""
    num_turns: int = 0
    """Answers on the path up to and including this node."""
    is_sampled: bool = True
    """`False` for an answer: appended, not sampled, and not trained on."""
    messages: tuple[Message, ...] = ()
    """What ends with this node, where tools are at hand: the model's message, or those that make up an answer."""
    num_calls: int = 0
    """Tool calls that were executed because of this segment."""
    num_failures: int = 0
    """Those of them that failed."""
    children: list[int] = field(default_factory=list[int])
    """Node ids of the children, in order of creation."""


class NodeRecord(TypedDict):
    """A node in `TreeRecord`, with the fields of [`SegmentNode`] that cannot be worked out."""

    parent: int | None
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason | None
    entropy: NotRequired[float]
    wave: NotRequired[int]
    is_sampled: NotRequired[bool]
    messages: NotRequired[list[Message]]
    num_calls: NotRequired[int]
    num_failures: NotRequired[int]


class TreeRecord(TypedDict):
    """A tree in a file."""

    prompt_ids: list[int]
    nodes: list[NodeRecord]
    leaves: list[int]


_FINISH_REASON = Kind(get_args(FinishReason).__contains__, f"one of {', '.join(get_args(FinishReason))}")


def check_node(record: NodeRecord, place: str) -> None:
    """Raise a `ValueError` unless a node of a file has the fields of `NodeRecord`, of their types."""
    check_fields(record, f"`{place}`", NodeRecord.__required_keys__, NodeRecord.__optional_keys__)
    check_value(record["parent"], f"{place}.parent", or_null(COUNT))
    check_list(record["token_ids"], f"{place}.token_ids", COUNT)
    if record["logprobs"] is not None:
        check_list(record["logprobs"], f"{place}.logprobs", NUMBER)
    check_value(record["finish_reason"], f"{place}.finish_reason", or_null(_FINISH_REASON))
    check_value(record.get("entropy"), f"{place}.entropy", or_null(NUMBER))
    check_value(record.get("wave", 0), f"{place}.wave", COUNT)
    check_value(record.get("is_sampled", True), f"{place}.is_sampled", FLAG)
    check_list(record.get("messages", []), f"{place}.messages", OBJECT)
    for name in ("num_calls", "num_failures"):
        check_value(record.get(name, 0), f"{place}.{name}", COUNT)


def node_record(node: SegmentNode) -> NodeRecord:
    """The node for a file, without what can be worked out."""
    record: NodeRecord = {
        "parent": node.parent,
        "token_ids": list(node.token_ids),
        "logprobs": None if node.logprobs is None else list(node.logprobs),
        "finish_reason": node.finish_reason,
    }
    if node.entropy is not None:
        record["entropy"] = node.entropy
    if node.wave:
        record["wave"] = node.wave
    if not node.is_sampled:
        record["is_sampled"] = False
    if node.messages:
        record["messages"] = list(node.messages)
    if node.num_calls:
        record["num_calls"], record["num_failures"] = node.num_calls, node.num_failures
    return record
