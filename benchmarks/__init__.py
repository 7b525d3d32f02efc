"""Measurements behind the figures of the docs: run each from the repository's root as `python -m benchmarks.NAME`."""
