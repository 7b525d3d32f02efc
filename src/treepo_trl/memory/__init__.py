"""
What a training takes of one GPU, counted without one: `plan` adds up, `activations` runs the update on shapes alone.
"""

from .plan import GIB, MemoryPlan, plan_memory


__all__ = ["GIB", "MemoryPlan", "plan_memory"]
