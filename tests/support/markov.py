"""
Policy gradients on a Markov chain: exact by summing over all completions, and as trees estimate them.

The policy's parameters are the logits of `MarkovEngine.TRANSITIONS`; the reward is 1 for a completion whose EOS
follows a 3. Used by tests of estimators and by `benchmarks/chains.py`.
"""

from collections.abc import Iterator

import torch

from tests.support.fakes import EOS, MarkovEngine
from treepo_trl import SegmentTree, TreeSampler, TreeSamplingConfig
from treepo_trl.update.advantages import leaf_paths, leaf_scores, tree_advantages
from treepo_trl.update.row_advantages import weighted_advantages


PROBABILITIES = torch.tensor(MarkovEngine.TRANSITIONS, dtype=torch.float64)
NUM_STATES = len(PROBABILITIES)


def exact_gradient(cap: int, state: int = 0) -> torch.Tensor:
    """
    `(states, states)`: gradient of the expected reward of at most `cap` tokens after `state`, in the logits.
    """
    logits = PROBABILITIES.log().requires_grad_()
    probabilities = logits.softmax(-1)
    alive = torch.eye(NUM_STATES, dtype=torch.float64)[state]
    expected_reward = torch.zeros((), dtype=torch.float64)
    for _ in range(cap):
        expected_reward = expected_reward + alive[3] * probabilities[3, EOS]
        alive = (alive @ probabilities) * torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected_reward, [logits])
    return gradient


def sample_trees(num_trees: int, width: int, cap: int, seed: int = 0, **changes: object) -> list[SegmentTree]:
    """Trees of the chain with segments of two tokens, and without fallback unless `changes` say otherwise."""
    paper = {"branch_schedule": "early", "fallback_policy": "none"}
    options = {"segment_length": 2, "stop_repetition": False, **paper, **changes}
    config = TreeSamplingConfig(num_generations=width, max_completion_length=cap, **options)
    sampler = TreeSampler(MarkovEngine(1, seed), config, [EOS])
    return sampler.sample([[9]] * num_trees, seed=seed)


def reward_of(tree: SegmentTree, leaf: int) -> float:
    """1 if the completion's EOS follows a 3."""
    return MarkovEngine.observed(tree.completion_ids(leaf))["from_three"]


def estimated_gradients(trees: list[SegmentTree], estimator: str, leaf_weighting: str) -> torch.Tensor:
    """`(trees, states, states)`: what each tree contributes to the gradient, the loss being a mean over leaves."""
    gradients = [torch.zeros(NUM_STATES, NUM_STATES, dtype=torch.float64)] * len(trees)
    for width in {len(tree.leaves) for tree in trees}:
        which = [i for i, tree in enumerate(trees) if len(tree.leaves) == width]
        alike = [trees[i] for i in which]
        ids, _ = leaf_paths(alike)
        rewards = [[reward_of(tree, leaf) for leaf in tree.leaves] for tree in alike]
        values = torch.tensor(rewards, dtype=torch.float64)
        if leaf_weighting == "inverse_branching":
            advantages = weighted_advantages(alike, ids, values, estimator)
        else:
            advantages = tree_advantages(values, ids, estimator, leaf_scores=leaf_scores(alike)) / width
        for i, tree, tree_ids, each in zip(which, alike, ids, advantages, strict=True):
            gradients[i] = gradient_of(tree, tree_ids, each, PROBABILITIES, 0)
    return torch.stack(gradients)


def gradient_of(
    tree: SegmentTree, ids: torch.Tensor, values: torch.Tensor, probabilities: torch.Tensor, first_state: int
) -> torch.Tensor:
    """
    `(states, states)`: sum over a tree's tokens of their values times the gradient of their log-probabilities.

    Args:
        tree ([`SegmentTree`]):
            Tokens are states of a chain.
        ids (`torch.Tensor` of shape `(leaves, depth)`), values (`torch.Tensor` of the same shape):
            Node of each segment of each leaf, -1 past the leaf; and what its tokens count for that leaf.
        probabilities (`torch.Tensor` of shape `(states, states)`):
            Of the chain's transitions, whose logits are the parameters.
        first_state (`int`):
            State in front of a completion.
    """
    # A node's transitions are those of all leaves below it, so their values add up.
    per_node = torch.zeros(len(tree.nodes) + 1, dtype=torch.float64)
    per_node.scatter_add_(0, torch.where(ids < 0, len(tree.nodes), ids).flatten(), values.flatten())
    counts = torch.zeros_like(probabilities)
    for node, value in zip(tree.nodes, per_node.tolist(), strict=False):
        state = first_state if node.parent is None else tree.nodes[node.parent].token_ids[-1]
        for token in node.token_ids:
            counts[state, token] += value
            state = token
    # d log p(token | state) / d logits[state] = one_hot(token) - p(state)
    return counts - counts.sum(1, keepdim=True) * probabilities


# Without chance: every tree, with its probability


class EveryDraw:
    """In place of a generator: run after run another outcome of its draws, until there is none."""

    def __init__(self) -> None:
        self._outcomes: list[tuple[int, int]] = []
        """Draw by draw: which value comes in this run, and how many there are to choose from."""

    def runs(self) -> Iterator[None]:
        """Each is one run of the experiment; `chance` is then its probability."""
        is_last = False
        while not is_last:
            self.chance, self._num_drawn = 1.0, 0
            yield
            while self._outcomes and self._outcomes[-1][0] == self._outcomes[-1][1] - 1:
                self._outcomes.pop()
            is_last = not self._outcomes
            if not is_last:
                value, count = self._outcomes[-1]
                self._outcomes[-1] = value + 1, count

    def choices(self, values: range, weights: tuple[float, ...]) -> list[int]:
        """As `random.Random.choices`."""
        if self._num_drawn == len(self._outcomes):
            self._outcomes.append((0, len(values)))
        which, _ = self._outcomes[self._num_drawn]
        self._num_drawn += 1
        self.chance *= weights[which]
        return [values[which]]


def every_tree(
    config: TreeSamplingConfig, seed: int, transitions: tuple[tuple[float, ...], ...] | None = None, **options: object
) -> tuple[list[SegmentTree], torch.Tensor]:
    """All trees that a sampler with this seed grows from a chain, and their chances."""
    engine, draws = MarkovEngine(1), EveryDraw()
    engine.TRANSITIONS = transitions or engine.TRANSITIONS  # pyright: ignore[reportAttributeAccessIssue]
    engine.rng = draws  # pyright: ignore[reportAttributeAccessIssue]
    trees: list[SegmentTree] = []
    chances: list[float] = []
    for _ in draws.runs():
        trees += TreeSampler(engine, config, [EOS]).sample([[9]], seed, **options)
        chances.append(draws.chance)
    return trees, torch.tensor(chances, dtype=torch.float64)
