"""
The tree of one prompt's completions, stored once per token.

Nodes live in a flat list and point to their parent by index; a node holds only the tokens that it adds. Invariant: the
prompt followed by the tokens along a path is exactly what the engine was given and returned. Standard library only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict, get_args

from .json_lines import COUNT, NUMBER, OBJECT, Kind, check_fields, check_list, check_value, or_null, shown


FinishReason = Literal["stop", "pattern", "repetition", "length"]
"""Why a path ended: an EOS token, the stop pattern, a repetition, or the cap on its length or on the tree's tokens."""


@dataclass(slots=True)
class SegmentNode:
    """One segment of a tree: the tokens between two branching points."""

    parent: int | None
    """Node id of the parent; `None` for a child of the root (the prompt)."""
    token_ids: tuple[int, ...]  # not a list: the garbage collector would visit every token again and again
    """Tokens added by this node, never empty."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the distribution it was sampled from; `None` if the engine gave none."""
    finish_reason: FinishReason | None = None
    """Why the path ended here; `None` for an inner node."""
    entropy: float | None = None
    """Mean entropy in nats of the distributions that the tokens were drawn from; `None` if the engine gave none."""
    depth: int = 0
    """Number of ancestors below the root: 0 for a child of the root."""
    end: int = 0
    """Completion tokens on the path up to and including this node."""
    wave: int = 0
    """0, or the number of the fallback that asked for the path."""
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


class TreeRecord(TypedDict):
    """A tree in a file."""

    prompt_ids: list[int]
    nodes: list[NodeRecord]
    leaves: list[int]


_FINISH_REASON = Kind(get_args(FinishReason).__contains__, f"one of {', '.join(get_args(FinishReason))}")


def _check_node(record: NodeRecord, place: str) -> None:
    """Raise unless a node of a file has the fields of `NodeRecord`, of their types."""
    check_fields(record, f"`{place}`", NodeRecord.__required_keys__, NodeRecord.__optional_keys__)
    check_value(record["parent"], f"{place}.parent", or_null(COUNT))
    check_list(record["token_ids"], f"{place}.token_ids", COUNT)
    if record["logprobs"] is not None:
        check_list(record["logprobs"], f"{place}.logprobs", NUMBER)
    check_value(record["finish_reason"], f"{place}.finish_reason", or_null(_FINISH_REASON))
    check_value(record.get("entropy"), f"{place}.entropy", or_null(NUMBER))
    check_value(record.get("wave", 0), f"{place}.wave", COUNT)


def _node_record(node: SegmentNode) -> NodeRecord:
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
    return record


class SegmentTree:
    """
    Completions of one prompt that share segments.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt, the root of the tree.

    Attributes:
        leaves (`list[int]`):
            Node ids of the finished paths: in order of completion while a tree grows, depth-first in the trees that a
            [`TreeSampler`] hands out. `leaf_weights` has the same order.

    Example:

    ```python
    >>> tree = SegmentTree(prompt_ids=[5, 6])
    >>> first = tree.add(None, [7, 8])
    >>> leaf = tree.add(first, [9], finish_reason="stop")
    >>> _ = tree.add(first, [10, 11], finish_reason="length")
    >>> tree.completion_ids(leaf)
    [7, 8, 9]
    >>> tree.num_unique_tokens, tree.num_leaf_tokens
    (5, 7)
    >>> tree.leaf_weights()
    [0.5, 0.5]

    ```
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = list(prompt_ids)
        self.nodes: list[SegmentNode] = []
        self.root_children: list[int] = []
        self.leaves: list[int] = []

    def add(
        self,
        parent: int | None,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None = None,
        finish_reason: FinishReason | None = None,
        entropy: float | None = None,
        wave: int = 0,
    ) -> int:
        """
        Append a segment below `parent` and return its node id. A segment with a `finish_reason` becomes a leaf.

        Args:
            parent (`int` or `None`):
                Node id to grow from; `None` grows from the prompt.
            token_ids (sequence of `int`):
                Tokens of the segment.
            logprobs (sequence of `float`, *optional*):
                One log-probability per token.
            finish_reason (`str`, *optional*):
                Why the path ends with this segment, if it does.
            entropy (`float`, *optional*):
                Mean entropy of the tokens' distributions, in nats.
            wave (`int`, *optional*, defaults to 0):
                Number of the fallback that asked for the path; 0 for none. Never less than the parent's.

        Raises:
            ValueError: if the segment is empty, the log-probabilities do not match the tokens, the parent does not
                exist, the parent is a leaf, or its wave is a later one.
        """
        if not token_ids:
            raise ValueError("A segment needs at least one token.")
        if logprobs is not None and len(logprobs) != len(token_ids):
            raise ValueError(f"Got {len(logprobs)} log-probabilities for {len(token_ids)} tokens.")
        depth, start = 0, 0
        siblings = self.root_children
        if parent is not None:
            if not 0 <= parent < len(self.nodes):
                raise ValueError(f"Parent {parent} does not exist: the tree has {len(self.nodes)} nodes.")
            parent_node = self.nodes[parent]
            if parent_node.finish_reason is not None:
                raise ValueError(f"Parent {parent} is a finished path ({parent_node.finish_reason}).")
            if wave < parent_node.wave:
                raise ValueError(f"Wave {wave} comes before that of parent {parent}, {parent_node.wave}.")
            depth, start, siblings = parent_node.depth + 1, parent_node.end, parent_node.children
        node_id = len(self.nodes)
        self.nodes.append(
            SegmentNode(
                parent,
                tuple(token_ids),
                None if logprobs is None else tuple(logprobs),
                finish_reason,
                entropy,
                depth=depth,
                end=start + len(token_ids),
                wave=wave,
            )
        )
        siblings.append(node_id)
        if finish_reason is not None:
            self.leaves.append(node_id)
        return node_id

    def finish(self, node: int, finish_reason: FinishReason) -> None:
        """
        Make a node without children a leaf: its path ends here after all.

        Raises:
            ValueError: if the node is a leaf already or has children.
        """
        if self.nodes[node].finish_reason is not None or self.nodes[node].children:
            raise ValueError(f"Segment {node} is finished already or has children: its path cannot end there.")
        self.nodes[node].finish_reason = finish_reason
        self.leaves.append(node)

    def path(self, node: int | None) -> list[int]:
        """Node ids from the root side down to and including `node`; empty for the root."""
        ids: list[int] = []
        while node is not None:
            ids.append(node)
            node = self.nodes[node].parent
        return ids[::-1]

    def tail_ids(self, node: int | None, length: int) -> list[int]:
        """The last `length` completion tokens on the path to `node`, fewer where the path is shorter."""
        tail: list[int] = []
        while node is not None and len(tail) < length:
            tail[:0] = self.nodes[node].token_ids[len(tail) - length :]
            node = self.nodes[node].parent
        return tail

    def completion_ids(self, leaf: int | None) -> list[int]:
        """Completion tokens along the path to `leaf`, without the prompt."""
        return self._extended([], leaf)

    def sequence_ids(self, node: int | None) -> list[int]:
        """Prompt tokens followed by the completion tokens along the path to `node`: what an engine continues."""
        return self._extended(list(self.prompt_ids), node)

    def _extended(self, token_ids: list[int], node: int | None) -> list[int]:
        for each in self.path(node):
            token_ids.extend(self.nodes[each].token_ids)
        return token_ids

    def logprobs(self, leaf: int) -> list[float]:
        """
        Sampling log-probability of each completion token on the path to `leaf`.

        Raises:
            ValueError: if a segment of the path was stored without log-probabilities.
        """
        values: list[float] = []
        for node in self.path(leaf):
            logprobs = self.nodes[node].logprobs
            if logprobs is None:
                raise ValueError(f"Segment {node} was stored without log-probabilities.")
            values.extend(logprobs)
        return values

    def sort_leaves(self) -> None:
        """
        Put `leaves` into depth-first order, children in order of creation.

        Leaves that share most of their tokens are then neighbours. Call it once the tree is done: a fallback draws
        from the order of completion.
        """
        self.leaves = []
        stack = self.root_children[::-1]
        while stack:
            node = stack.pop()
            if self.nodes[node].finish_reason is not None:
                self.leaves.append(node)
            stack.extend(reversed(self.nodes[node].children))

    def leaf_weights(self) -> list[float]:
        """
        Weight of each leaf, in the order of `leaves`: the product over its path of 1 / (number of siblings).

        Given its past a node's children are independent samples, so this undoes the tilt that branching puts on the
        leaf distribution. It is exact for branching decided before the children are seen. A fallback adds children
        because of how others ended, so its leaves have weight 0. It is approximate for `max_tree_tokens`, which cuts
        paths. Sums to 1 once every path is finished.
        """
        shares = self.node_weights()
        return [shares[leaf] for leaf in self.leaves]

    def node_weights(self) -> list[float]:
        """Weight of each node: the product over its path of 1 / (number of siblings); 0 for those of a fallback."""
        num_siblings = Counter(node.parent for node in self.nodes if not node.wave)
        shares: list[float] = []
        for node in self.nodes:  # parents come before children
            above = 1.0 if node.parent is None else shares[node.parent]
            shares.append(0.0 if node.wave else above / num_siblings[node.parent])
        return shares

    def mean_length(self) -> float:
        """Mean completion tokens of a leaf under `leaf_weights`: that of independent samples."""
        # In order of the nodes, so that the last bit of the sum does not depend on the order of the leaves.
        pairs = zip(self.node_weights(), self.nodes, strict=True)
        return sum(share * node.end for share, node in pairs if node.finish_reason is not None)

    @property
    def num_unique_tokens(self) -> int:
        """Completion tokens of the tree, each node counted once."""
        return sum(len(node.token_ids) for node in self.nodes)

    @property
    def num_leaf_tokens(self) -> int:
        """Completion tokens of the leaves, each leaf counted in full."""
        return sum(self.nodes[leaf].end for leaf in self.leaves)

    def to_dict(self) -> TreeRecord:
        """The tree as plain JSON types; `from_dict` reads it back."""
        return {
            "prompt_ids": self.prompt_ids,
            "nodes": [_node_record(node) for node in self.nodes],
            "leaves": self.leaves,
        }

    @classmethod
    def from_dict(cls, d: TreeRecord) -> "SegmentTree":
        """
        Rebuild a tree from `to_dict`, its leaves in the stored order.

        A stored order is kept because what lies beside a tree in a file has the same one, such as `completions`. Old
        files have the order of completion; `sort_leaves` makes it depth-first.

        Raises:
            ValueError: naming the node and the field, if anything is not as `to_dict` writes it.
        """
        check_fields(d, "The tree", TreeRecord.__required_keys__)
        check_list(d["prompt_ids"], "prompt_ids", COUNT)
        check_list(d["nodes"], "nodes", OBJECT)
        check_list(d["leaves"], "leaves", COUNT)
        tree = cls(d["prompt_ids"])
        for i, node in enumerate(d["nodes"]):
            _check_node(node, f"nodes[{i}]")
            try:
                tree.add(
                    node["parent"],
                    node["token_ids"],
                    node["logprobs"],
                    node["finish_reason"],
                    node.get("entropy"),
                    node.get("wave", 0),
                )
            except ValueError as error:
                raise ValueError(f"`nodes[{i}]`: {error}") from error
        if sorted(tree.leaves) != sorted(d["leaves"]):
            leaves, finished = shown(d["leaves"]), shown(tree.leaves)
            raise ValueError(f"`leaves` is {leaves}; it must be the nodes with a finish reason, {finished}.")
        tree.leaves = list(d["leaves"])
        return tree
