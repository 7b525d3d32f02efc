"""
The tree of one prompt's completions, stored once per token.

Nodes live in a flat list and point to their parent by index; a node holds only the tokens that it adds. Invariant: the
prompt followed by the tokens along a path is exactly what the engine was given and returned. Standard library only.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from .json_lines import COUNT, OBJECT, check_fields, check_list, shown
from .nodes import FinishReason, SegmentNode, TreeRecord, check_node, node_record


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
        is_sampled: bool = True,
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
            is_sampled (`bool`, *optional*, defaults to `True`):
                `False` for an answer: what an environment has appended.

        Raises:
            ValueError: if the segment is empty, the log-probabilities do not match the tokens, the parent does not
                exist, the parent is a leaf, or its wave is a later one.
        """
        if not token_ids:
            raise ValueError("A segment needs at least one token.")
        if logprobs is not None and len(logprobs) != len(token_ids):
            raise ValueError(f"Got {len(logprobs)} log-probabilities for {len(token_ids)} tokens.")
        depth, start, sampled, turns = 0, 0, 0, 0
        siblings = self.root_children
        if parent is not None:
            if not 0 <= parent < len(self.nodes):
                raise ValueError(f"Parent {parent} does not exist: the tree has {len(self.nodes)} nodes.")
            parent_node = self.nodes[parent]
            if parent_node.finish_reason is not None:
                raise ValueError(f"Parent {parent} is a finished path ({parent_node.finish_reason}).")
            if wave < parent_node.wave:
                raise ValueError(f"Wave {wave} comes before that of parent {parent}, {parent_node.wave}.")
            depth, siblings = parent_node.depth + is_sampled, parent_node.children
            start, sampled, turns = parent_node.end, parent_node.sampled_end, parent_node.num_turns
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
                sampled_end=sampled + len(token_ids) * is_sampled,
                num_turns=turns + (not is_sampled),
                is_sampled=is_sampled,
            )
        )
        siblings.append(node_id)
        if finish_reason is not None:
            self.leaves.append(node_id)
        return node_id

    def add_path(
        self,
        parent: int | None,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None = None,
        mask: Sequence[int] | None = None,
    ) -> int:
        """
        Append a path that is done below `parent`, and return its leaf.

        Args:
            parent (`int` or `None`):
                Node id to grow from; `None` grows from the prompt.
            token_ids (sequence of `int`):
                Tokens of the path.
            logprobs (sequence of `float`, *optional*):
                One log-probability per token; those of tokens that were not sampled do not matter.
            mask (sequence of `int`, *optional*):
                1 for each token that was sampled and 0 for the others, which become answers. By default all were.

        Raises:
            ValueError: as `add`, and if the mask does not match the tokens.
        """
        flags = [True] * len(token_ids) if mask is None else [bool(flag) for flag in mask]
        if len(flags) != len(token_ids):
            raise ValueError(f"Got a mask of {len(flags)} values for {len(token_ids)} tokens.")
        runs = [(is_sampled, len(list(run))) for is_sampled, run in groupby(flags)] or [(True, 0)]
        start = 0
        for i, (is_sampled, length) in enumerate(runs):
            own = slice(start, start + length if i < len(runs) - 1 else None)
            values = logprobs[own] if logprobs is not None and is_sampled else None
            reason = "stop" if i == len(runs) - 1 else None
            wave = 0 if parent is None else self.nodes[parent].wave
            parent = self.add(parent, token_ids[own], values, reason, wave=wave, is_sampled=is_sampled)
            start += length
        assert parent is not None, "there was a run"
        return parent

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

    def turn_start(self, node: int | None) -> int | None:
        """The answer that the turn of `node` follows, `node` itself if it is one; `None` in the first turn."""
        while node is not None and self.nodes[node].is_sampled:
            node = self.nodes[node].parent
        return node

    def tail_ids(self, node: int | None, length: int) -> list[int]:
        """The last `length` tokens of a turn up to and including `node`; fewer if they are not there."""
        tail: list[int] = []
        while node is not None and self.nodes[node].is_sampled and len(tail) < length:
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
        Sampling log-probability of each completion token on the path to `leaf`; 0 for tokens of answers.

        Raises:
            ValueError: if a segment of the path was stored without log-probabilities.
        """
        values: list[float] = []
        for node in self.path(leaf):
            logprobs = self.nodes[node].logprobs
            if not self.nodes[node].is_sampled:
                logprobs = (0.0,) * len(self.nodes[node].token_ids)
            if logprobs is None:
                raise ValueError(f"Segment {node} was stored without log-probabilities.")
            values.extend(logprobs)
        return values

    def sampled_mask(self, leaf: int) -> list[int]:
        """1 for each completion token on the path to `leaf` that was sampled, 0 for those of answers."""
        nodes = [self.nodes[node] for node in self.path(leaf)]
        return [int(node.is_sampled) for node in nodes for _ in node.token_ids]

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
        """Mean sampled tokens of a leaf under `leaf_weights`: that of independent samples."""
        # In order of the nodes, so that the last bit of the sum does not depend on the order of the leaves.
        pairs = zip(self.node_weights(), self.nodes, strict=True)
        return sum(share * node.sampled_end for share, node in pairs if node.finish_reason is not None)

    @property
    def num_unique_tokens(self) -> int:
        """Sampled tokens of the tree, each node counted once."""
        return sum(len(node.token_ids) for node in self.nodes if node.is_sampled)

    @property
    def num_leaf_tokens(self) -> int:
        """Sampled tokens of the leaves, each leaf counted in full."""
        return sum(self.nodes[leaf].sampled_end for leaf in self.leaves)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers, each node counted once."""
        return sum(len(node.token_ids) for node in self.nodes if not node.is_sampled)

    @classmethod
    def from_rows(
        cls,
        prompt_ids: list[int],
        completion_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]] | None = None,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> "SegmentTree":
        """
        The tree of completions that a search of one's own has sampled: equal prefixes become shared segments.

        `leaves` has the order of the completions. The last token of a completion is always its own, so that equal
        completions are different leaves.

        Args:
            prompt_ids (`list[int]`):
                Tokens of the prompt.
            completion_ids (sequence of sequences of `int`):
                Tokens of each completion.
            logprobs (sequence of sequences of `float`, *optional*):
                A log-probability per token; shared tokens get those of the first completion.
            masks (sequence of sequences of `int`, *optional*):
                1 for each token that was sampled, 0 for those of an environment.

        Raises:
            ValueError: if a completion is empty, or values do not match the tokens.

        Example:

        ```python
        >>> tree = SegmentTree.from_rows([5], [[7, 8, 9], [7, 8, 10], [11]])
        >>> [tree.nodes[node].token_ids for node in tree.path(tree.leaves[1])]
        [(7, 8), (10,)]

        ```
        """
        tree = cls(prompt_ids)
        flags = [[1] * len(row) for row in completion_ids] if masks is None else masks
        leaves: dict[int, int] = {}
        todo: list[tuple[int | None, list[int], int]] = [(None, list(range(len(completion_ids))), 0)]
        while todo:
            parent, rows, start = todo.pop()
            groups: dict[object, list[int]] = {}
            for row in rows:
                is_last = start >= len(completion_ids[row]) - 1
                key = row if is_last else (completion_ids[row][start], bool(flags[row][start]))
                groups.setdefault(key, []).append(row)
            for first, *others in groups.values():
                token_ids, mask = completion_ids[first], flags[first]
                values = None if logprobs is None else logprobs[first]
                if not others:
                    rest = None if values is None else values[start:]
                    leaves[first] = tree.add_path(parent, token_ids[start:], rest, mask[start:])
                    continue
                end = start + 1
                while all(
                    end < len(completion_ids[row]) - 1
                    and completion_ids[row][end] == token_ids[end]
                    and bool(flags[row][end]) == bool(mask[end]) == bool(mask[start])
                    for row in (first, *others)
                ):
                    end += 1
                own = values[start:end] if values is not None and mask[start] else None
                node = tree.add(parent, token_ids[start:end], own, is_sampled=bool(mask[start]))
                todo.append((node, [first, *others], end))
        tree.leaves = [leaves[row] for row in range(len(completion_ids))]
        return tree

    def to_dict(self) -> TreeRecord:
        """The tree as plain JSON types; `from_dict` reads it back."""
        return {
            "prompt_ids": self.prompt_ids,
            "nodes": [node_record(node) for node in self.nodes],
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
            check_node(node, f"nodes[{i}]")
            values = node["parent"], node["token_ids"], node["logprobs"], node["finish_reason"]
            try:
                tree.add(*values, node.get("entropy"), node.get("wave", 0), node.get("is_sampled", True))
            except ValueError as error:
                raise ValueError(f"`nodes[{i}]`: {error}") from error
            tree.nodes[i].messages = tuple(node.get("messages", ()))
            tree.nodes[i].num_calls, tree.nodes[i].num_failures = node.get("num_calls", 0), node.get("num_failures", 0)
        if sorted(tree.leaves) != sorted(d["leaves"]):
            leaves, finished = shown(d["leaves"]), shown(tree.leaves)
            raise ValueError(f"`leaves` is {leaves}; it must be the nodes with a finish reason, {finished}.")
        tree.leaves = list(d["leaves"])
        return tree
