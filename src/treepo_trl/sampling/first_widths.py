"""What a tree's widths are before anything is known about the task: those of its schedule, and those of the prompt."""

import math

from .config import TreeSamplingConfig


def first_widths(config: TreeSamplingConfig, expected_length: int | None) -> list[float] | None:
    """The schedule's own widths, if it has some, for paths that all have the expected length in tokens."""
    if config.own_widths is None:
        return None
    assert config.segment_length is not None, "set by the config"
    length = min(expected_length or config.max_completion_length, config.max_completion_length)
    depth = math.ceil(length / config.segment_length)
    return config.own_widths([1.0] * depth, [1.0] * depth, config.num_generations)


def num_first_branches(config: TreeSamplingConfig) -> int:
    """Children of the prompt that every tree has at least, without training and without `max_tree_tokens`."""
    widths = first_widths(config, config.expected_completion_length)
    first = config.first_width[0] if widths is None else max(int(widths[0]), 2)
    return min(first, config.num_generations)
