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
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.support.models import save_random_smollm2
from tests.support.paths import ROOT
from tests.support.segments import full_logprobs


@pytest.mark.parametrize("name", ["tasks.jsonl", "held_out.jsonl"])
def test_files_of_the_user_are_not_overwritten(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("mine")
    flags = ["--output_dir", str(tmp_path / "sft"), "--model_folder", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["sft_adapter.py", *flags, "--use_cpu", "true", "--bf16", "false"])
    with pytest.raises(SystemExit, match=f"{name} exists already"):
        runpy.run_path(str(ROOT / "examples/scripts/sft_adapter.py"), run_name="__main__")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_the_life_of_an_adapter(small_model_dir: str, tmp_path: Path) -> None:
    """Examples, rewards, a comparison, a look, and home: the last model says what the last adapter does."""
    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    save_random_smollm2(tokenizer, tmp_path / "model")
    binaries = Path(sys.executable).parent
    if not (binaries / "treepo-trl").exists():
        pytest.skip("treepo-trl is not installed in this environment")
    path = os.pathsep.join([str(binaries), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "MODEL": str(tmp_path / "model"),
        "STEPS": "2",
        "BATCH": "16",
        "PROMPTS": "2",
    }
    environment |= {"REWARD": "tests.support.trainers.parity_reward"}  # a random model never adds rightly
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
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

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(life / "merged")
    prompt, completion = [500, 501], [502, 503, 504]
    adapted = full_logprobs(PeftModel.from_pretrained(base, life / "rl").eval(), prompt, completion)
    torch.testing.assert_close(full_logprobs(merged.eval(), prompt, completion), adapted, atol=1e-4, rtol=0)
    assert "PARAMETER stop" in (life / "merged/Modelfile").read_text()
    question = [{"role": "user", "content": "3 + 4 + 5"}]
    answer = pipeline("text-generation", model=str(life / "merged"))(question, max_new_tokens=4)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
