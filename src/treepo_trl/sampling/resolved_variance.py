"""
Where a task is decided: how much of the outcome's variance the segments of each depth resolve.

Two paths that part at a depth share what earlier segments have decided, so half of the squared difference of their
rewards holds what this depth and all deeper ones decide. What the next depth's pairs hold is taken from it, and what
is left is decided here. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .tree import SegmentTree


_DECAY = 0.97
"""What a batch keeps of its weight at the next one: 33 batches count."""


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
        weights (`list[float]`), squares (`list[float]`):
            Weights of the groups of siblings; these times half the mean squared difference of rewards between leaves
            below different siblings.
    """

    num_trees: float
    alive: list[float]
    tokens: list[float]
    weights: list[float]
    squares: list[float]

    @classmethod
    def of_depth(cls, depth: int) -> "DepthStatistics":
        """Nothing seen yet, for paths of at most `depth` segments."""
        return cls.from_flat([0.0] * (1 + 4 * depth), depth)

    # To and from a flat list, which checkpoints hold and processes add up

    def flat(self) -> list[float]:
        """All numbers, one after another; [`from_flat`] reads them back."""
        return [self.num_trees, *self.alive, *self.tokens, *self.weights, *self.squares]

    @classmethod
    def from_flat(cls, values: Sequence[float], depth: int) -> "DepthStatistics":
        """What [`flat`] gave for this depth. Raises a `ValueError` if it is that of another depth."""
        if len(values) != 1 + 4 * depth:
            raise ValueError(f"{len(values)} numbers are no statistics of {depth} depths.")
        return cls(values[0], *(list(values[1 + i * depth : 1 + (i + 1) * depth]) for i in range(4)))

    def then(self, later: "DepthStatistics") -> "DepthStatistics":
        """These statistics after another batch."""
        pairs = zip(self.flat(), later.flat(), strict=True)
        return self.from_flat([_DECAY * before + after for before, after in pairs], len(self.alive))

    def add(self, tree: SegmentTree, rewards: Sequence[float | None]) -> None:
        """
        Count a tree. An answer belongs to its segment; segments below the last depth count as part of that one.

        Args:
            tree ([`SegmentTree`]):
                Whatever a fallback added is left out: it is there because of how others ended.
            rewards (sequence of `float`, *optional*):
                Reward of each leaf, in the order of `tree.leaves`; `None` if it could not be scored.
        """
        self.num_trees += 1
        shares = tree.node_weights()
        # By node: mean reward and mean squared reward of its leaves, by their weights.
        moments = {
            leaf: (reward, reward**2) for leaf, reward in zip(tree.leaves, rewards, strict=True) if reward is not None
        }
        for node in range(len(tree.nodes) - 1, -1, -1):  # children come behind their parents
            each = tree.nodes[node]
            if each.wave:
                continue
            if each.is_sampled and each.depth < len(self.alive):
                self.alive[each.depth] += shares[node]
                self.tokens[each.depth] += shares[node] * len(each.token_ids)
            known = [moments[child] for child in each.children if child in moments and not tree.nodes[child].wave]
            if known:
                moments[node] = self._add_siblings(known, each.depth + 1, shares[node])
        known = [moments[child] for child in tree.root_children if child in moments and not tree.nodes[child].wave]
        if known:
            self._add_siblings(known, 0, 1.0)

    def _add_siblings(self, known: list[tuple[float, float]], depth: int, weight: float) -> tuple[float, float]:
        """Count a group of siblings by their moments; returns those of their parent."""
        count = len(known)
        total, square = sum(mean for mean, _ in known), sum(square for _, square in known)
        if count > 1 and depth < len(self.alive):
            products = (total**2 - sum(mean**2 for mean, _ in known)) / (count * (count - 1))  # of different siblings
            self.weights[depth] += weight
            self.squares[depth] += weight * (square / count - products)
        return total / count, square / count

    # What they say

    def resolved(self) -> list[float | None]:
        """
        Variance of the value that the segments of each depth resolve, in the mean over paths that have one.

        Unbiased if what a depth resolves does not depend on how many siblings its paths have; it may be negative.
        `None` where no siblings were seen.
        """
        found: list[float | None] = [None] * len(self.alive)
        deeper = 0.0  # what the depths below resolve, times the weight that is alive there
        for depth in range(len(found) - 1, -1, -1):
            if self.weights[depth] > 0:
                from_here = self.alive[depth] * self.squares[depth] / self.weights[depth]
                found[depth] = (from_here - deeper) / self.alive[depth]
                deeper = from_here
        return found

    def shape(self) -> tuple[list[float], list[float]]:
        """Tokens of each depth, and the share of paths that are alive there, per path of the tree."""
        tokens = [number / self.num_trees for number in self.tokens]
        return tokens, [weight / self.num_trees for weight in self.alive]
