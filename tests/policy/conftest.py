"""Fixtures of the tests with the real vLLM engine."""

import pytest


@pytest.fixture
def float32_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads float32 checkpoints in bfloat16; in float32 rounding cannot hide a missing update."""
    from vllm import LLM

    original = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda self, **kwargs: original(self, dtype="float32", **kwargs))


@pytest.fixture
def plain_cpu_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor vLLM packs the weights of linear layers for faster kernels; on CUDA it keeps them as they are."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils.ops, "_supports_onednn", False)
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)
