"""
What fills a generation batch with trees: which prompts, how wide, sampled now or ahead, and what becomes of them.

A trainer's own; the trees are grown by `sampling`, and `TreeBatch` turns them into the rows that `GRPOTrainer` takes.
"""

from treepo_trl.policy.engine import PolicyEngine
from treepo_trl.sampling import TreeSampler
from treepo_trl.trl.host import Host

from .ahead import AheadSource
from .dynamic import DynamicSource
from .resume_point import ResumePoint
from .source import TreeSource
from .tree_batch import TreeBatch, prompts_of_trees, shuffle_trees
from .turns import TrainerTurns


def tree_source(host: Host, sampler: TreeSampler, engine: PolicyEngine, turns: TrainerTurns) -> TreeSource:
    """Where the trees of a training's batches come from; see [`TreeSource`]."""
    args = host.args
    kind = DynamicSource if args.chooses_prompts else AheadSource if args.rollout_ahead > 0 else TreeSource
    return kind(host, sampler, engine, turns)


__all__ = [
    "ResumePoint",
    "TrainerTurns",
    "TreeBatch",
    "TreeSource",
    "prompts_of_trees",
    "shuffle_trees",
    "tree_source",
]
