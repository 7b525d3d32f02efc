"""
What fills a generation batch with trees: which prompts, how wide, sampled now or ahead, and what becomes of them.

A trainer's own; the trees are grown by `sampling`, and `TreeBatch` turns them into the rows that `GRPOTrainer` takes.
"""

from .batch_sampler import BatchSampler
from .dynamic_sampling import DynamicSampling, Rows, forget_stream
from .resume_point import ResumePoint
from .rollout_ahead import RolloutAhead
from .trainer_turns import TrainerTurns
from .tree_batch import TreeBatch, prompts_of_trees, shuffle_trees


__all__ = [
    "BatchSampler",
    "DynamicSampling",
    "ResumePoint",
    "RolloutAhead",
    "Rows",
    "TrainerTurns",
    "TreeBatch",
    "forget_stream",
    "prompts_of_trees",
    "shuffle_trees",
]
