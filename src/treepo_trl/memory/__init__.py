"""
What a training takes of a GPU's memory, counted without one: `plan` adds up what `weights` and `activations` count.
"""

from .plan import GIB, MemoryPlan, plan_memory


__all__ = ["GIB", "MemoryPlan", "plan_memory"]
