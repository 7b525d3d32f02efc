"""
Grow trees of segments over any engine: Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445).

Decides who branches and when a path ends; knows no model and no torch.
"""

from .config import TreeSamplingConfig
from .nodes import FinishReason, SegmentNode
from .sampler import SamplingStats, TreeSampler
from .stopping import text_decoder
from .tree import SegmentTree


__all__ = [
    "FinishReason",
    "SamplingStats",
    "SegmentNode",
    "SegmentTree",
    "TreeSampler",
    "TreeSamplingConfig",
    "text_decoder",
]
