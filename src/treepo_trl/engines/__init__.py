"""Engines that sample segments. `vllm` and `transformers` are imported only by the module that needs them."""

from .base import SamplingOptions, SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult


__all__ = ["SamplingOptions", "SegmentEngine", "SegmentEngineError", "SegmentRequest", "SegmentResult"]
