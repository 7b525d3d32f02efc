"""Fixtures of the tests with the real vLLM engine, and with servers."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from treepo_trl.engines import server_pool


@pytest.fixture
def lost_servers_are_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_WAIT", "_LONGEST_WAIT"):
        monkeypatch.setattr(server_pool, name, 0.05)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


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
