"""
What a training takes of a GPU's memory, counted without one: `plan` adds up what `weights` and `activations` count.
"""

from .plan import GIB, MemoryPlan, plan_memory
from .weights import NotPlannedError


__all__ = ["GIB", "MemoryPlan", "NotPlannedError", "plan_memory"]
