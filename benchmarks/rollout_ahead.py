"""
Seconds per step with a batch sampled ahead and without, where sampling and update only wait.

    python -m benchmarks.rollout_ahead --sampling 1 --update 1

The trainer is the real one, on a model of two layers. Its engine answers at once but waits for `--sampling` seconds in
all per batch, as one on a server would, and the update waits for `--update` seconds. So it shows what the trainer
overlaps, and nothing about an engine.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import pytest
from transformers import TrainerCallback

from benchmarks.common import make_parser


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--sampling", type=float, default=1.0, help="seconds that a batch takes")
    parser.add_argument("--update", type=float, default=1.0, help="seconds that an update takes at least")
    parser.add_argument("--steps", type=int, default=8)
    return parser.parse_args()


class Clock(TrainerCallback):
    """Makes updates take a while, and notes when each ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.ends = seconds, [time.perf_counter()]

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Called by the trainer."""
        time.sleep(self.seconds)

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Called by the trainer."""
        self.ends.append(time.perf_counter())


def seconds_per_step(ahead: int, options: argparse.Namespace, folder: Path) -> float:
    """Median over all steps but the first two and the last, which overlap less."""
    from tests.support.fakes import FakeEngine, memoryless
    from tests.support.models import make_model
    from tests.support.policies import FakePolicy, use_fake_policy
    from tests.support.trainers import build, make_config
    from treepo_trl import TreePOTrainer

    class SlowEngine(FakeEngine):
        first = True

        def submit(self, requests: list) -> None:
            if self.first:
                time.sleep(options.sampling)
            self.first = False
            super().submit(requests)

    engine = SlowEngine(memoryless(0.1))

    def begin(_: object) -> None:
        engine.first = True

    with pytest.MonkeyPatch.context() as patched:
        use_fake_policy(patched, lambda args: FakePolicy(args, begin, engine))
        config = make_config(folder, max_steps=options.steps, log_level="error", logging_steps=1000)
        config.rollout_ahead = ahead  # refused by the check outside of server mode
        clock = Clock(options.update)
        trainer = build(TreePOTrainer, make_model(), config, callbacks=[clock])
        trainer.train()
    times = [end - start for start, end in zip(clock.ends[2:-2], clock.ends[3:-1], strict=True)]
    return median(times)


def main() -> None:
    """Print both, and their ratio."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        values = [seconds_per_step(ahead, options, Path(folder, str(ahead))) for ahead in (0, 1)]
    print(f"sampling {options.sampling:g} s, update {options.update:g} s: {values[0]:.2f} s per step, ", end="")
    print(f"{values[1]:.2f} s with a batch ahead, {values[0] / values[1]:.2f} times as fast")


if __name__ == "__main__":
    main()
