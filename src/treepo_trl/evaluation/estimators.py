"""
mean@k, pass@k and maj@k of one prompt, from independent completions or from the leaves of a tree.

Two leaves of a tree that share tokens are not independent, so a tree of `n` leaves is not `n` samples. Its subtrees
are what counts: those below different children of the prompt part at once, and their weighted leaves together are
unbiased for everything that can be said about as many independent completions (docs/evaluate.md has the proof). An
independent completion is a subtree of one leaf, so the same functions serve both, and give then the usual estimators.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo_trl.sampling import SegmentTree

from .answers import Judgement


_NUM_ELECTIONS = 2000
_RIGHT = object()
_SILENT = -1  # the vote of a completion without an answer


@dataclass(frozen=True)
class Draw:
    """One leaf of a subtree."""

    weight: float
    """Its part of the subtree; those of a subtree sum to 1."""
    judgement: Judgement


Subtree = Sequence[Draw]
"""The leaves below one child of the prompt: one for an independent completion."""


def subtrees_of(tree: SegmentTree, judgements: Sequence[Judgement]) -> list[Subtree]:
    """
    The subtrees of a tree whose weighted leaves are independent samples, in order of their first node.

    Those of a fallback are none: they are there because others ended early.

    Args:
        tree ([`SegmentTree`]):
            A tree that is done.
        judgements (sequence of [`Judgement`]):
            One for each leaf, in the order of `tree.leaves`.
    """
    starts = {node: [] for node in tree.root_children if not tree.nodes[node].wave}
    for leaf, weight, judgement in zip(tree.leaves, tree.leaf_weights(), judgements, strict=True):
        if weight > 0:
            starts[tree.path(leaf)[0]].append(Draw(weight * len(starts), judgement))
    return list(starts.values())


def default_ks(num_samples: int) -> list[int]:
    """1, 2, 4 and so on, up to the number of independent samples of a prompt."""
    return [2**i for i in range(num_samples.bit_length())]


def mean_score(subtrees: Sequence[Subtree]) -> float:
    """Expected score of one completion."""
    return sum(draw.weight * draw.judgement.score for subtree in subtrees for draw in subtree) / len(subtrees)


def pass_at_k(subtrees: Sequence[Subtree], k: int) -> float:
    """
    Probability that at least one of `k` independent completions is right, without bias.

    1 minus the mean, over all choices of `k` subtrees, of the product of their weights of wrong leaves. With `n`
    independent completions, of which `c` are right, that is 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: if there are fewer than `k` subtrees: no unbiased estimate exists then.
    """
    _check(subtrees, k)
    # means[j]: mean over all choices of j of the subtrees so far, of the product of what is wrong in them
    means = [1.0] + [0.0] * k
    for i, subtree in enumerate(subtrees, start=1):
        wrong = 1.0 - math.fsum(draw.weight for draw in subtree if draw.judgement.is_right)
        for j in range(min(i, k), 0, -1):
            means[j] = ((i - j) * means[j] + j * wrong * means[j - 1]) / i
    return min(max(1.0 - means[k], 0.0), 1.0)


def majority_at_k(subtrees: Sequence[Subtree], k: int, seed: int | str = 0) -> float:
    """
    Probability that the most frequent answer of `k` independent completions is right, without bias.

    The mean over 2000 elections, in which `k` of the subtrees vote with one leaf each, drawn by its weight. Where all
    of them vote with one leaf each there is nothing to draw, and the value is exact. Right completions have the same
    answer. One without an answer has no vote, and no vote at all is wrong. Of equally frequent answers one is drawn,
    so the right one among `t` of them counts 1 / t.

    Args:
        subtrees (sequence of `Subtree`):
            Those of one prompt.
        k (`int`):
            Voters.
        seed (`int` or `str`):
            Seed of the elections. Prompts with the same one would err together.

    Raises:
        ValueError: if there are fewer than `k` subtrees.
    """
    _check(subtrees, k)
    rng = np.random.default_rng(list(f"{seed}/{k}".encode()))
    codes: dict[object, int] = {_RIGHT: 0, None: _SILENT}
    votes = np.empty((_NUM_ELECTIONS, len(subtrees)), dtype=np.int64)
    for i, subtree in enumerate(subtrees):
        answers = [_RIGHT if draw.judgement.is_right else draw.judgement.answer for draw in subtree]
        own_codes = [codes.setdefault(answer, len(codes) - 1) for answer in answers]
        weights = np.array([draw.weight for draw in subtree])
        votes[:, i] = rng.choice(own_codes, _NUM_ELECTIONS, p=weights / weights.sum())
    voting = rng.permuted(votes, axis=1)[:, :k]
    counts = np.stack([(voting == code).sum(axis=1) for code in range(len(codes) - 1)])  # (answers, elections)
    most = counts.max(axis=0)
    is_right = (counts[0] == most) & (most > 0)
    return float((is_right / (counts == most).sum(axis=0)).mean())


def _check(subtrees: Sequence[Subtree], k: int) -> None:
    if not 1 <= k <= len(subtrees):
        raise ValueError(f"k is {k}; it must be between 1 and the {len(subtrees)} independent samples of a prompt.")
