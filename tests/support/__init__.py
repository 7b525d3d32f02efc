"""Tiny models, engines without a model and helpers for tests and benchmarks."""
