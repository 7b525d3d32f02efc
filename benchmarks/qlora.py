"""
QLoRA with vLLM: how far the engine that samples is from the policy that is trained, per step, with stock TRL and here.

    python -m benchmarks.qlora                      # SmolLM2-135M-Instruct in NF4; CPU (20 minutes) or GPU

The figure is `sampling/sampling_logp_difference/mean` as TRL logs it: the mean absolute difference of the sampled
tokens' log-probabilities in nats. In stock TRL the engine quantizes the checkpoint itself. At each step TRL merges the
adapter into the 4-bit weights, pushes every weight into the engine and takes the adapter out again. Of a 4-bit weight
it pushes the codes without their scales. The reward is the length of the answer and the learning rate is high, so that
few steps move the policy. Each way runs in a process of its own. Prints a Markdown table.
"""

import argparse
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import (
    OUTPUTS,
    ProcessFailed,
    make_parser,
    nf4_config,
    number_type,
    option_arguments,
    print_result,
    result_of,
    small_model_folder,
    table_head,
    table_row,
)
from treepo_trl import TreePOConfig, TreePOTrainer


WAYS: dict[str, dict[str, object]] = {
    "stock TRL": {},
    "quantized": {"vllm_base_weights": "quantized"},
    "dequantized": {"vllm_base_weights": "dequantized"},
    "shared base": {"vllm_share_base_weights": True},
}


def train(way: str, options: argparse.Namespace) -> list[float]:
    """The difference at each step of a short training."""
    use_cpu = not torch.cuda.is_available()
    dtype, precision = number_type()
    arguments: dict[str, Any] = {
        "output_dir": str(OUTPUTS / "qlora"),
        "use_cpu": use_cpu,
        **precision,
        "seed": options.seed,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": options.length,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 256 + options.length,
        "model_init_kwargs": {"dtype": dtype},
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
        "max_steps": options.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        **WAYS[way],
    }
    trainer_class: Any = GRPOTrainer if way == "stock TRL" else TreePOTrainer
    config_class = GRPOConfig if way == "stock TRL" else TreePOConfig
    if use_cpu and way != "stock TRL":
        arguments["tree_packing"] = "off"  # 8 rows of few tokens, as in stock TRL
    trainer = trainer_class(
        model=options.model or small_model_folder(),
        args=config_class(**arguments),
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": ["Tell me about the sea.", "What is two plus two?"] * 32}),
        quantization_config=nf4_config(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    return [log["sampling/sampling_logp_difference/mean"] for log in trainer.state.log_history if "loss" in log]


def run(way: str, options: argparse.Namespace) -> str:
    """A row of the table, from a process of its own."""
    arguments = ["--only", way, *option_arguments(options, ("steps", "length", "learning_rate", "seed"))]
    arguments += ["--model", options.model] if options.model else []
    try:
        differences = cast(list[float], result_of("benchmarks.qlora", arguments))
    except ProcessFailed as error:
        return table_row(way, error)
    return table_row(way, *(f"{value:.3f}" for value in differences))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder; default: the small model that comes with packages")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=32, help="max_completion_length")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Print a row for each way."""
    options = parse_options()
    if options.only:
        print_result(train(options.only, options))
        return
    print(f"Nats between engine and policy, learning rate {options.learning_rate:g}\n")
    print(table_head("way", *(f"step {i + 1}" for i in range(options.steps))))
    for way in options.ways:
        print(run(way, options), flush=True)


if __name__ == "__main__":
    main()
