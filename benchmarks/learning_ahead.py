"""
Whether trees that are one update old teach less: `rollout_ahead` 0 and 1 with the same engine.

    python -m benchmarks.learning_ahead --jobs 2   # half an hour on two cores

The task, the model and the arm (`sqrt 8`) are those of `benchmarks.learning` on `gcd`. The engine samples from a copy
of the policy, as a server does, and gives the log-probabilities for TRL's importance ratio. With `rollout_ahead=1` the
next batch is sampled from that copy while the policy is updated, and is one update old when it is used.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks import learning
from benchmarks.common import table_head, table_row
from benchmarks.learning import ARMS, interpolate, mean_of_curve, settings
from benchmarks.learning_runs import results_of, runs_parser, train_and_write
from benchmarks.learning_tasks import datasets_of
from treepo_trl import TreePOTrainer, treepo_trainer
from treepo_trl.engines.for_model import engine_for_model
from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.quickstart import answer_reward


class CopiedPolicy(PolicyEngine):
    """Samples from a copy of the policy, which it renews when it is made ready after an update."""

    gives_logprobs = True

    def connect(self, trainer: GRPOTrainer) -> None:
        """Copy the policy."""
        self._trainer, self._step = trainer, 0
        self._copy = cast(PreTrainedModel, copy.deepcopy(trainer.model)).eval().requires_grad_(False)
        self.engine = engine_for_model(self._copy, trainer.eos_token_ids, self.args.sampling_options())

    @contextmanager
    def ready(self, seed: str, prompts: list[list[int]], in_batch: bool = False) -> Iterator[None]:
        """Renew the copy."""
        if self._step != self._trainer.state.global_step:
            self._copy.load_state_dict(cast(PreTrainedModel, self._trainer.model).state_dict())
            self._step = self._trainer.state.global_step
        try:
            yield
        finally:
            self.engine.reset_prefix_cache()


def train(ahead: int, seed: int, options: argparse.Namespace) -> None:
    """One run; writes `result.json`."""
    folder = run_folder(ahead, seed, options)
    args = settings(ARMS["sqrt 8"], "gcd", seed, options.rate, options, folder)
    args.rollout_ahead = ahead  # behind the check for servers: this engine shares nothing with the update
    dataset, held_out = datasets_of("gcd", options.held_out, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(treepo_trainer, "policy_engine_for", lambda args, *_: CopiedPolicy(args))
        trainer = TreePOTrainer(
            model=str(options.out / f"gcd-{learning.WARM_START}"),
            reward_funcs=answer_reward,
            args=args,
            train_dataset=dataset,
        )
    trainer.use_vllm, trainer.vllm_mode = True, "server"  # for TRL, which then corrects by the importance ratio
    train_and_write(trainer, held_out, options, folder)


def run_folder(ahead: int, seed: int, options: argparse.Namespace) -> Path:
    """Where a run keeps its files."""
    return options.out / f"ahead-{ahead}-{options.rate:g}-{seed}"


def main() -> None:
    """Run what is missing, and print the table; with `--run`, one run in this process."""
    options = runs_parser(__doc__).parse_args()
    if options.run:
        train(int(options.run[0]), int(options.run[1]), options)
        return
    runs = [(ahead, seed) for ahead in (0, 1) for seed in range(options.seeds)]
    found = results_of("benchmarks.learning_ahead", runs, lambda run: run_folder(*run, options), options)
    print(
        table_head("`rollout_ahead`", "start", "end", "mean of the curve", "importance ratio, mean and least", "steps")
    )
    for ahead in (0, 1):
        results = [found[ahead, seed] for seed in range(options.seeds)]
        points = [[interpolate(each, [at])[0] for each in results] for at in (0, options.tokens)]
        columns = np.array([*points, [mean_of_curve(each, options) for each in results]])
        cells = [f"{each.mean():.3f} ± {each.std(ddof=min(1, len(each) - 1)):.3f}" for each in columns]
        log = [row for each in results for row in each["log"]]
        ratios = [[row[f"sampling/importance_sampling_ratio/{name}"] for row in log] for name in ("mean", "min")]
        cells.append(f"{np.mean(ratios[0]):.3f}, {np.min(ratios[1]):.3f}")
        print(table_row(ahead, *cells, f"{np.mean([each['steps'] for each in results]):.0f}"), flush=True)


if __name__ == "__main__":
    main()
