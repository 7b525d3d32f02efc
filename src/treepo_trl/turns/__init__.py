"""
What answers a model's turns in a tree: tools, environments, and rollouts of the user's own.

Knows conversations as messages and tokens, no model and no TRL: how turns are parsed and answers become tokens is
handed over.
"""

from .conversations import ToolTurns
from .environments import (
    EnvironmentForking,
    EnvironmentPool,
    EnvironmentReplayError,
    EnvironmentTree,
    RandomResetError,
    forking_of,
)
from .rollouts import TreeRollout
from .tool_runner import ToolRunner, ToolThreadError, tools_by_name


__all__ = [
    "EnvironmentForking",
    "EnvironmentPool",
    "EnvironmentReplayError",
    "EnvironmentTree",
    "RandomResetError",
    "ToolRunner",
    "ToolThreadError",
    "ToolTurns",
    "TreeRollout",
    "forking_of",
    "tools_by_name",
]
