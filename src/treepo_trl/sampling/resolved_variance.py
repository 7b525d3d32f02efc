"""
Where a task is decided: how much of the outcome's variance the segments of each depth resolve.

The variance that depth `l` resolves is that of a child's value given its parent, in the mean over paths. Siblings show
it, by nested analysis of variance: the sample variance of their values holds what they resolve, and the noise that is
left in each value. That noise is what deeper depths resolve, over the number of paths which share it. Standard library
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .tree import SegmentTree


_DECAY = 0.97
"""What a batch keeps of its weight at the next one: 33 batches count."""
_PRIOR_GROUPS = 20.0
"""Groups of siblings that count as much as knowing nothing."""


@dataclass
class DepthStatistics:
    """
    Sums over the trees of recent batches, by depth. Sums over processes and over batches are sums of the fields.

    Attributes:
        num_trees (`float`):
            How many trees there were.
        alive (`list[float]`):
            Leaf weight that had a segment at this depth.
        tokens (`list[float]`):
            Tokens of these segments, times weight.
        groups (`list[float]`), weights (`list[float]`), squares (`list[float]`):
            Groups of siblings; their weights; their weights times the sample variance of their values.
        noise (`list[list[float]]`):
            For each depth and each deeper one: weights times the share in that sample variance of what the deeper one
            resolves.
    """

    num_trees: float = 0.0
    alive: list[float] = field(default_factory=list[float])
    tokens: list[float] = field(default_factory=list[float])
    groups: list[float] = field(default_factory=list[float])
    weights: list[float] = field(default_factory=list[float])
    squares: list[float] = field(default_factory=list[float])
    noise: list[list[float]] = field(default_factory=list[list[float]])

    @classmethod
    def of_depth(cls, depth: int) -> "DepthStatistics":
        """Nothing seen yet, for paths of at most `depth` segments."""
        zeros = [[0.0] * depth for _ in range(5)]
        return cls(0.0, *zeros, noise=[[0.0] * depth for _ in range(depth)])

    # To and from a flat list, which checkpoints hold and processes add up

    def flat(self) -> list[float]:
        """All numbers, one after another; [`from_flat`] reads them back."""
        columns = self.alive, self.tokens, self.groups, self.weights, self.squares, *self.noise
        return [self.num_trees, *(value for column in columns for value in column)]

    @classmethod
    def from_flat(cls, values: Sequence[float], depth: int) -> "DepthStatistics":
        """What [`flat`] gave for this depth. Raises a `ValueError` if it is that of another depth."""
        if len(values) != 1 + depth * (5 + depth):
            raise ValueError(f"{len(values)} numbers are no statistics of {depth} depths.")
        columns = [list(values[1 + i * depth : 1 + (i + 1) * depth]) for i in range(5 + depth)]
        alive, tokens, groups, weights, squares, *noise = columns
        return cls(values[0], alive, tokens, groups, weights, squares, noise)

    def then(self, later: "DepthStatistics") -> "DepthStatistics":
        """These statistics after another batch."""
        pairs = zip(self.flat(), later.flat(), strict=True)
        return self.from_flat([_DECAY * before + after for before, after in pairs], len(self.alive))

    def add(self, tree: SegmentTree, rewards: Sequence[float | None]) -> None:
        """
        Count a tree. An answer belongs to its segment; segments below the last depth count as noise of that one.

        Args:
            tree ([`SegmentTree`]):
                Whatever a fallback added is left out: it is there because of how others ended.
            rewards (sequence of `float`, *optional*):
                Reward of each leaf, in the order of `tree.leaves`; `None` if it could not be scored.
        """
        self.num_trees += 1
        values: list[float | None] = [None] * len(tree.nodes)
        for leaf, reward in zip(tree.leaves, rewards, strict=True):
            values[leaf] = reward
        shares = tree.node_weights()
        # By node: what each deeper depth resolves, as a share in the noise of the node's value.
        below: list[dict[int, float]] = [{} for _ in tree.nodes]
        for node in range(len(tree.nodes) - 1, -1, -1):  # children come behind their parents
            each = tree.nodes[node]
            if each.wave:
                continue
            if each.is_sampled and each.depth < len(self.alive):
                self.alive[each.depth] += shares[node]
                self.tokens[each.depth] += shares[node] * len(each.token_ids)
            children = [child for child in each.children if not tree.nodes[child].wave]
            if len(children) == 1 and not tree.nodes[children[0]].is_sampled:
                values[node], below[node] = values[children[0]], below[children[0]]
            elif children:
                values[node], below[node] = self._group(children, each.depth + 1, shares[node], values, below)
        self._group([child for child in tree.root_children if not tree.nodes[child].wave], 0, 1.0, values, below)

    def _group(
        self, children: list[int], depth: int, weight: float, values: list[float | None], below: list[dict[int, float]]
    ) -> tuple[float | None, dict[int, float]]:
        """Count a group of siblings; value of their parent, and the shares in its noise."""
        known = [(value, below[child]) for child in children if (value := values[child]) is not None]
        count = len(known)
        if count == 0:
            return None, {}
        mean = sum(value for value, _ in known) / count
        if depth >= len(self.alive):
            return mean, {}
        sums: dict[int, float] = {}
        for _, shares in known:
            for deeper, share in shares.items():
                sums[deeper] = sums.get(deeper, 0.0) + share
        if count > 1:
            self.groups[depth] += 1
            self.weights[depth] += weight
            self.squares[depth] += weight * sum((value - mean) ** 2 for value, _ in known) / (count - 1)
            for deeper, share in sums.items():
                self.noise[depth][deeper] += weight * share / count
        return mean, {depth: 1 / count} | {deeper: share / count**2 for deeper, share in sums.items()}

    # What they say

    def resolved(self) -> list[float | None]:
        """
        Variance of the value that the segments of each depth resolve, in the mean over paths that have one.

        Unbiased if what a depth resolves does not depend on how many siblings its paths have; it may be negative.
        `None` where no siblings were seen.
        """
        found: list[float | None] = [None] * len(self.alive)
        for depth in range(len(found) - 1, -1, -1):
            if self.weights[depth] > 0:
                noise = sum(share * (found[deeper] or 0.0) for deeper, share in enumerate(self.noise[depth]))
                found[depth] = (self.squares[depth] - noise) / self.weights[depth]
        return found

    def shape(self) -> tuple[list[float], list[float]]:
        """Tokens of each depth, and the share of paths that are alive there, per path of the tree."""
        tokens = [number / self.num_trees for number in self.tokens]
        return tokens, [weight / self.num_trees for weight in self.alive]

    def resolved_by_paths(self) -> list[float]:
        """
        Variance that each depth resolves over all paths, those that have ended included.

        It is the measured one as far as there is evidence. The rest is in proportion to the tokens of a depth.
        """
        found, (tokens, alive) = self.resolved(), self.shape()
        total = max(sum(a * (v or 0.0) for a, v in zip(alive, found, strict=True)), 0.0)
        per_token = total / max(sum(tokens), 1e-12)
        mixed: list[float] = []
        for a, c, v, groups in zip(alive, tokens, found, self.groups, strict=True):
            evidence = 0.0 if v is None else groups / (groups + _PRIOR_GROUPS)
            mixed.append(max(evidence * a * (v or 0.0), 0.0) + (1 - evidence) * per_token * c)
        return mixed
