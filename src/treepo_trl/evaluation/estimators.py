"""
mean@k, pass@k and maj@k of one prompt, from independent completions or from the leaves of a tree. Standard library.

Two leaves of a tree that share tokens are not independent, so a tree of `n` leaves is not `n` samples. Its subtrees
are what counts: those below different children of the prompt part at once, and their weighted leaves together are
unbiased for everything that can be said about as many independent completions (docs/evaluate.md has the proof). An
independent completion is a subtree of one leaf, so the same functions serve both, and give then the usual estimators.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from treepo_trl.sampling import SegmentTree

from .answers import Judgement


_MAX_EXACT_CHOICES = 20_000
"""Choices of completions that a vote of trees enumerates at most."""
_NUM_DRAWS = 20_000
"""Choices that it draws where there are more."""
_RIGHT = object()


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

    Right completions have the same answer. One without an answer has no vote, and no vote at all is wrong. Of equally
    frequent answers one is drawn, so the right one among `t` of them counts 1 / t.

    Args:
        subtrees (sequence of `Subtree`):
            Those of one prompt.
        k (`int`):
            Voters.
        seed (`int` or `str`):
            Seed of the drawn choices, for trees with so many leaves that not all choices are counted.

    Raises:
        ValueError: if there are fewer than `k` subtrees.
    """
    _check(subtrees, k)
    ballots = [_ballot(subtree) for subtree in subtrees]
    if all(len(ballot) == 1 for ballot in ballots):
        return _majority_of_counts(Counter(vote for ballot in ballots for vote in ballot), k)
    num_choices = sum(math.prod(map(len, chosen)) for chosen in _bounded_combinations(ballots, k))
    if num_choices <= _MAX_EXACT_CHOICES:
        return _majority_of_all_choices(ballots, k)
    rng = random.Random(f"{seed}/{k}")
    drawn = [[_vote(ballot, rng) for ballot in rng.sample(ballots, k)] for _ in range(_NUM_DRAWS)]
    return math.fsum(map(_share_of_right, drawn)) / len(drawn)


def _check(subtrees: Sequence[Subtree], k: int) -> None:
    if not 1 <= k <= len(subtrees):
        raise ValueError(f"k is {k}; it must be between 1 and the {len(subtrees)} independent samples of a prompt.")


def _ballot(subtree: Subtree) -> dict[object, float]:
    """Weight of each answer in a subtree, `None` for no answer."""
    weights: dict[object, float] = {}
    for draw in subtree:
        vote = _RIGHT if draw.judgement.is_right else draw.judgement.answer
        weights[vote] = weights.get(vote, 0.0) + draw.weight
    return weights


def _vote(ballot: dict[object, float], rng: random.Random) -> object:
    (vote,) = rng.choices(list(ballot), list(ballot.values()))
    return vote


def _share_of_right(votes: Sequence[object]) -> float:
    """Probability that the right answer wins an election."""
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    winners = [vote for vote, count in counts.items() if count == most]
    return (_RIGHT in winners) / max(len(winners), 1)


def _bounded_combinations(ballots: list[dict[object, float]], k: int) -> list[tuple[dict[object, float], ...]]:
    """All choices of `k` ballots, or the first of them if there are too many to count."""
    return list(itertools.islice(itertools.combinations(ballots, k), _MAX_EXACT_CHOICES + 1))


def _majority_of_all_choices(ballots: list[dict[object, float]], k: int) -> float:
    total = math.fsum(
        math.prod(ballot[vote] for ballot, vote in zip(chosen, votes, strict=True)) * _share_of_right(votes)
        for chosen in itertools.combinations(ballots, k)
        for votes in itertools.product(*chosen)
    )
    return total / math.comb(len(ballots), k)


def _majority_of_counts(counts: Counter[object], k: int) -> float:
    """
    Probability that the right answer wins among `k` of the votes, drawn without putting back.

    Counts, for each number `m` of right votes, the choices of the others in which no wrong answer has more than `m`,
    by how many of them have exactly `m`.
    """
    num_right, num_silent = counts[_RIGHT], counts[None]
    wrong = [count for vote, count in counts.items() if vote is not None and vote is not _RIGHT]
    favourable = Fraction(0)
    for m in range(1, min(num_right, k) + 1):
        ways = {(0, 0): 1}  # (votes taken, answers with m of them) -> choices
        for count in wrong:
            ways = _with_another_answer(ways, count, m, k - m)
        share = sum(
            (Fraction(n * math.comb(num_silent, k - m - taken), 1 + ties) for (taken, ties), n in ways.items()),
            Fraction(0),
        )
        favourable += math.comb(num_right, m) * share
    return float(favourable / math.comb(counts.total(), k))


def _with_another_answer(
    ways: dict[tuple[int, int], int], count: int, most: int, room: int
) -> dict[tuple[int, int], int]:
    """Choices after one more wrong answer, which `count` voters gave and of which at most `most` are chosen."""
    longer: dict[tuple[int, int], int] = {}
    for (taken, ties), num in ways.items():
        for own in range(min(count, most, room - taken) + 1):
            key = taken + own, ties + (own == most)
            longer[key] = longer.get(key, 0) + num * math.comb(count, own)
    return longer
