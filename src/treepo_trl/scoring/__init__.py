"""
From the samples of a batch to the rows that the update takes: rewards, advantages, what is logged of them.

`GRPOTrainer` scores rows; here stands what it is given for that, and what becomes of what it returns.
"""

from .batch_scoring import BatchScoring
from .reward_watch import check_interruptible


__all__ = ["BatchScoring", "check_interruptible"]
