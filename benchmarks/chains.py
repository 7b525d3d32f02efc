"""
Noise of tree estimators of the policy gradient per decoded token, on chains of decisions whose gradient is known.

    python -m benchmarks.chains               # all chains; 10 minutes on a core

A completion walks through states: undecided, on the right track, lost, ended. The reward is 1 if it ends on the right
track. `late`, `errors` and `early` differ in how soon a completion is decided and how often it changes sides. With
unequal norms a lost path draws each token from four that are alike, as a model is unsure where it errs.

Columns are noise per decoded token over that of as many independent completions under leave-one-out. Noise is the
variance of one tree's estimate over the squared part of its mean along the true gradient, which is in brackets where
it is not 1. `constant` subtracts the mean reward, `value` the true value of the prefix. Trees have no fallback, and
leaves count by `inverse_branching` unless the estimator is biased anyway. The rows `all` are for a batch whose prompts
are drawn from hard, middle and easy ones: the noise between prompts comes on top, which no tree takes away.
"""

import statistics
from dataclasses import dataclass

import torch

from benchmarks.common import make_parser, table_head, table_row
from tests.support.fakes import MarkovEngine
from tests.support.markov import gradient_of
from treepo_trl import SegmentTree, TreeSampler, TreeSamplingConfig
from treepo_trl.sampling.resolved_variance import DepthStatistics
from treepo_trl.sampling.widths import square_root_widths
from treepo_trl.update.advantages import leaf_paths, leaf_scores, tree_advantages


SEGMENT, CAP = 8, 160
END, UNDECIDED, RIGHT, LOST = range(4)
CHAINS = {"late": (0.03, 0.15, 0.02), "errors": (0.3, 0.02, 0.03), "early": (0.18, 0.04, 0.002)}
"""How soon a path decides, ends, and changes sides, per token."""
SHARES = {"hard": 0.05, "middle": 0.4, "easy": 0.9}
"""Decisions that are right."""
SCHEDULES = ("independent", "early", "spread", "sqrt")
ESTIMATORS = ("constant", "value", "leave_one_out", "optimal_baseline", "grpo", "treepo")


class Chain:
    """Transitions, what the engine needs of them, and what is exact about them."""

    def __init__(self, leave: float, end: float, flip: float, right: float, num_lost: int) -> None:
        lost = [1.0 / num_lost] * num_lost
        rows = [
            [0.0] * (3 + num_lost),
            [0, 1 - leave, leave * right, *(leave * (1 - right) * x for x in lost)],
            [end, 0, 1 - end - flip, *(flip * x for x in lost)],
        ]
        rows += [[end, 0, flip, *((1 - end - flip) * x for x in lost)]] * num_lost
        self.rows = rows
        self.p = torch.tensor(rows, dtype=torch.float64)
        self.values = [torch.zeros(len(rows), dtype=torch.float64)]  # by tokens left
        stays = self.p.clone()
        stays[:, END] = 0
        for _ in range(CAP):
            self.values.append(stays @ self.values[-1])
            self.values[-1][RIGHT] += self.p[RIGHT, END]
        self.mean_reward = self.values[CAP][UNDECIDED].item()

    def gradient(self) -> torch.Tensor:
        """Gradient of the mean reward in the logits."""
        logits = self.p.clamp_min(1e-30).log().requires_grad_()
        p, reward = logits.softmax(-1), torch.zeros((), dtype=torch.float64)
        alive = torch.zeros(len(self.rows), dtype=torch.float64)
        alive[UNDECIDED] = 1
        mask = torch.ones_like(alive)
        mask[END] = 0
        for _ in range(CAP):
            reward = reward + alive[RIGHT] * p[RIGHT, END]
            alive = (alive @ p) * mask
        return torch.autograd.grad(reward, [logits])[0]

    def rewards(self, tree: SegmentTree) -> list[float]:
        """Reward of each leaf."""
        completions = [[UNDECIDED, *tree.completion_ids(leaf)] for leaf in tree.leaves]
        return [float(tokens[-1] == END and tokens[-2] == RIGHT) for tokens in completions]

    def trees(self, schedule: str, num: int, seed: int, width: int) -> list[SegmentTree]:
        """Trees of a schedule; `sqrt` takes its lengths from 400 trees before."""
        engine = MarkovEngine(0, seed)
        engine.TRANSITIONS = self.rows  # pyright: ignore
        names = {"independent": "early"}
        config = TreeSamplingConfig(
            num_generations=width,
            max_completion_length=CAP,
            segment_length=SEGMENT,
            branching_factor=1 if schedule == "independent" else 2,
            branch_schedule=names.get(schedule, schedule),  # pyright: ignore
            stop_repetition=False,
            fallback_policy="none",
        )
        sampler = TreeSampler(engine, config, [END])
        prompts = [[UNDECIDED]] * num
        if schedule in ("early", "independent"):
            return sampler.sample(prompts, seed)
        statistics_ = DepthStatistics.of_depth(config.max_tree_depth)
        widths, length = None, None
        for batch in range(50):
            trees = sampler.sample(prompts[:8], f"{seed}/{batch}", widths=widths, expected_length=length)
            now = DepthStatistics.of_depth(config.max_tree_depth)
            for tree in trees:
                now.add(tree, self.rewards(tree))
            statistics_ = statistics_.then(now)
            length = round(statistics.mean(tree.mean_length() for tree in trees))
            if schedule != "spread":
                widths = square_root_widths(*statistics_.shape(), width)
        return sampler.sample(prompts, seed, widths=widths, expected_length=length)

    def estimate(self, tree: SegmentTree, estimator: str) -> torch.Tensor:
        """What one tree contributes to the gradient."""
        ids, _ = leaf_paths([tree])
        rewards = torch.tensor(self.rewards(tree), dtype=torch.float64)
        weights = torch.tensor(tree.leaf_weights(), dtype=torch.float64)
        if estimator in ("grpo", "treepo"):
            weights = torch.full_like(weights, 1 / len(weights))
        if estimator in ("constant", "value"):
            values = rewards[:, None].expand(ids.shape[1:])
            base = torch.tensor([self._base(tree, node, estimator) for node in range(len(tree.nodes))] + [0.0])
            values = values - base[ids[0]]
        else:
            scores = leaf_scores([tree])[0]
            values = tree_advantages(rewards, ids[0], estimator, leaf_weights=weights, leaf_scores=scores)
        return gradient_of(tree, ids[0], values * weights[:, None], self.p, UNDECIDED)

    def _base(self, tree: SegmentTree, node: int, estimator: str) -> float:
        if estimator == "constant":
            return self.mean_reward
        parent = tree.nodes[node].parent
        if parent is None:
            return self.mean_reward
        above = tree.nodes[parent]
        return self.values[CAP - above.end][above.token_ids[-1]].item()


@dataclass
class Cell:
    """What trees of one prompt under one schedule show."""

    tokens: float
    leaves: float
    along: dict[str, float]
    """Part of an estimator's mean along the true gradient."""
    variance: dict[str, float]
    """Of an estimator's trees, summed over coordinates."""

    def noise(self, estimator: str, exact: torch.Tensor) -> float:
        """Variance over the squared gradient, per decoded token."""
        return self.variance[estimator] / self._scale(estimator) ** 2 / exact.square().sum().item() * self.tokens

    def within(self, estimator: str) -> float:
        """Variance of an estimator that is scaled to the true gradient."""
        return self.variance[estimator] / self._scale(estimator) ** 2

    def _scale(self, estimator: str) -> float:
        return self.along[estimator] if estimator in ("grpo", "treepo") else 1.0


def measured(chain: Chain, schedule: str, num: int, width: int) -> Cell:
    """Trees of a prompt, and what each estimator makes of them."""
    trees, exact = chain.trees(schedule, num, 1, width), chain.gradient()
    cell = Cell(
        statistics.mean(tree.num_unique_tokens for tree in trees),
        statistics.mean(len(tree.leaves) for tree in trees),
        {},
        {},
    )
    for estimator in ESTIMATORS:
        x = torch.stack([chain.estimate(tree, estimator) for tree in trees])
        cell.along[estimator] = ((x.mean(0) * exact).sum() / (exact * exact).sum()).item()
        cell.variance[estimator] = (x - x.mean(0)).pow(2).sum((1, 2)).mean().item()
    return cell


def of_batch(cells: list[Cell], gradients: list[torch.Tensor], estimator: str) -> float:
    """Noise of a batch that draws its prompts from all, per decoded token: that of a tree, and between prompts."""
    mean = torch.stack(gradients).mean(0)
    between = torch.stack([(gradient - mean).square().sum() for gradient in gradients]).mean().item()
    within = statistics.mean(cell.within(estimator) for cell in cells)
    return (within + between) / mean.square().sum().item() * statistics.mean(cell.tokens for cell in cells)


def main() -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--trees", type=int, default=400)
    parser.add_argument("--width", type=int, default=16, help="leaves of a tree at most")
    parser.add_argument("--chains", nargs="+", default=list(CHAINS), choices=CHAINS)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    options = parser.parse_args()
    print(table_head("chain", "norms", "prompt", "schedule", "leaves", "tokens", *ESTIMATORS))
    for name in options.chains:
        for norms, num_lost in (("equal", 1), ("unequal", 4)):
            chains = {prompt: Chain(*CHAINS[name], share, num_lost) for prompt, share in SHARES.items()}
            exact = {prompt: chain.gradient() for prompt, chain in chains.items()}
            cells = {
                (prompt, schedule): measured(chain, schedule, options.trees, options.width)
                for prompt, chain in chains.items()
                for schedule in options.schedules
            }
            for (prompt, schedule), cell in cells.items():
                reference = cells[prompt, options.schedules[0]].noise("leave_one_out", exact[prompt])
                row = [f"{cell.noise(e, exact[prompt]) / reference:.2f} ({cell.along[e]:.2f})" for e in ESTIMATORS]
                print(table_row(name, norms, prompt, schedule, f"{cell.leaves:.1f}", f"{cell.tokens:.0f}", *row))
            gradients, reference = list(exact.values()), 0.0
            for schedule in options.schedules:
                own = [cells[prompt, schedule] for prompt in chains]
                noise = [of_batch(own, gradients, estimator) for estimator in ESTIMATORS]
                reference = reference or noise[ESTIMATORS.index("leave_one_out")]
                tokens = statistics.mean(cell.tokens for cell in own)
                row = [f"{each / reference:.2f}" for each in noise]
                print(table_row(name, norms, "all", schedule, "", f"{tokens:.0f}", *row), flush=True)


if __name__ == "__main__":
    main()
