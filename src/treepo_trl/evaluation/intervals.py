"""How sure a mean over prompts is: bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


_NUM_RESAMPLES = 2000
_TAILS = 2.5, 97.5
_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its 95 % interval."""

    value: float
    low: float
    high: float


def estimates(values: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    """
    The mean over prompts of each metric, with its percentile bootstrap interval.

    The prompts are drawn with putting back, 2000 times, the same for all metrics and calls: another set of prompts of
    the same kind could have given any of these means. Of one prompt the interval is the value.

    Args:
        values (mapping of `str` to sequences of `float`):
            A value per prompt for each metric, at least one; as many for all of them.
    """
    table = np.array(list(values.values()), dtype=np.float64)  # (metrics, prompts)
    num_prompts = table.shape[1]
    rng = np.random.default_rng(_SEED)
    drawn = [table[:, rng.integers(num_prompts, size=num_prompts)].mean(axis=1) for _ in range(_NUM_RESAMPLES)]
    low, high = np.percentile(np.array(drawn), _TAILS, axis=0)
    means = table.mean(axis=1)
    return {name: Estimate(float(means[i]), float(low[i]), float(high[i])) for i, name in enumerate(values)}
