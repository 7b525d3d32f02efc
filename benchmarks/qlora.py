"""
QLoRA with vLLM: how far the engine that samples is from the policy that is trained, per step, with stock TRL and here.

    python benchmarks/qlora.py                      # SmolLM2-135M-Instruct in NF4; CPU (20 minutes) or GPU

The figure is `sampling/sampling_logp_difference/mean`, the mean absolute difference of the sampled tokens'
log-probabilities in nats, as TRL logs it. Stock TRL merges the adapter into the 4-bit weights, pushes every weight
(of 4-bit ones the codes without their scales) into an engine that has quantized the checkpoint itself, and takes the
adapter out again. The reward is the length of the answer, and the learning rate high, so that few steps move the
policy. Each way is a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.quickstart.embedded import small_model


WAYS: dict[str, dict[str, Any]] = {
    "stock TRL": {},
    "quantized": {"vllm_base_weights": "quantized"},
    "dequantized": {"vllm_base_weights": "dequantized"},
    "shared base": {"vllm_share_base_weights": True},
}


def train(way: str, options: argparse.Namespace) -> list[float]:
    """The difference at each step of a short training."""
    use_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": "outputs/benchmarks/qlora",
        "use_cpu": use_cpu,
        "bf16": not use_cpu,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": options.length,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 256 + options.length,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
        "max_steps": options.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        **WAYS[way],
    }
    trainer_class: Any = GRPOTrainer if way == "stock TRL" else TreePOTrainer
    config_class: Any = GRPOConfig if way == "stock TRL" else TreePOConfig
    if use_cpu and way != "stock TRL":
        arguments["tree_packing"] = "off"  # 8 rows of few tokens, as in stock TRL
    trainer = trainer_class(
        model=str(small_model(Path(".cache/smollm2-135m-instruct"))),
        args=config_class(**arguments),
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": ["Tell me about the sea.", "What is two plus two?"] * 32}),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    return [log["sampling/sampling_logp_difference/mean"] for log in trainer.state.log_history if "loss" in log]


def run(way: str, options: argparse.Namespace) -> str:
    """A row of the table, from a process of its own."""
    command = [sys.executable, __file__, "--only", way]
    for name in ("steps", "length", "learning_rate"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode != 0 or not lines:
        return f"| {way} | {' '.join(done.stderr.split())[-160:]} |"
    return f"| {way} | {' | '.join(f'{value:.3f}' for value in json.loads(lines[-1]))} |"


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=32, help="max_completion_length")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--only", choices=WAYS, help="train in one way in this process and print JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(train(options.only, options)))
        return
    print(f"Nats between engine and policy, learning rate {options.learning_rate:g}\n")
    print(f"| way | {' | '.join(f'step {i + 1}' for i in range(options.steps))} |\n|{'---|' * (options.steps + 1)}")
    for way in options.ways:
        print(run(way, options), flush=True)


if __name__ == "__main__":
    main()
