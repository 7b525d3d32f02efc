"""
How good a model is on prompts with known answers: mean@k, pass@k and maj@k of its samples, and how sure they are.

Takes scores and answers of completions, and knows no model and no torch; `in_training` has them from a trainer.
"""

from .answers import Judgement
from .estimators import Draw, Subtree, default_ks, majority_at_k, mean_score, pass_at_k, subtrees_of
from .intervals import Estimate, estimates


__all__ = [
    "Draw",
    "Estimate",
    "Judgement",
    "Subtree",
    "default_ks",
    "estimates",
    "majority_at_k",
    "mean_score",
    "pass_at_k",
    "subtrees_of",
]
