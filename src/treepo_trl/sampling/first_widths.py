"""What a tree's widths are before anything is known about the task: those of `sqrt`, and those of the prompt."""

import math

from .config import TreeSamplingConfig
from .widths import square_root_widths


def first_widths(config: TreeSamplingConfig, expected_length: int | None) -> list[float]:
    """Widths of `sqrt`, by depth, for paths that all have the expected length in tokens."""
    assert config.segment_length is not None, "set by the config"
    length = min(expected_length or config.max_completion_length, config.max_completion_length)
    depth = math.ceil(length / config.segment_length)
    return square_root_widths([1.0] * depth, [1.0] * depth, config.num_generations)


def num_first_branches(config: TreeSamplingConfig) -> int:
    """Children of the prompt that every tree has at least, without training and without `max_tree_tokens`."""
    if config.branch_schedule == "sqrt" and config.branching_factor > 1:
        width = int(first_widths(config, config.expected_completion_length)[0])
        return min(max(width, 2), config.num_generations)
    return min(config.first_width[0], config.num_generations)
