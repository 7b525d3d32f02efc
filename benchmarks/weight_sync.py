"""
Seconds from an optimizer step to an engine that answers with the new policy: the adapter alone against TRL's way.

    python -m benchmarks.weight_sync                              # SmolLM2-135M, on a CPU or a GPU
    python -m benchmarks.weight_sync --architecture qwen2.5-1.5b  # random weights, for a GPU
    python -m benchmarks.weight_sync --load_in_4bit               # QLoRA: the engine's base in 4 bits, and dequantized

Each way has a trainer of its own. They run one after the other in one process. First the engine's speed is measured,
on the same prompts for each way: an engine that loads the adapter has LoRA layers, one that takes merged weights has
plain ones. Then come the synchronizations. The adapter changes before each of them, and the first one is left out,
since it compiles and allocates.

TRL's way merges the adapter and pushes every weight. vLLM for CPUs packs its weights for its kernels and can take none
after that. So TRL's way comes twice on a CPU, the second time with layers that are not packed, as on CUDA. In 4 bits
both ways load the adapter alone, on the two kinds of base that `vllm_base_weights` has. Prints a Markdown table.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks.common import (
    OUTPUTS,
    device_name,
    make_parser,
    median_and_range,
    nf4_config,
    number_type,
    seconds,
    small_model_folder,
    table_head,
    table_row,
)
from benchmarks.random_models import MODELS, random_checkpoint
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.trl.seams import replaced


UNPACKED = "merge, layers not packed"


def model_folder(architecture: str | None, folder: Path) -> str:
    """SmolLM2-135M-Instruct, or random weights of an architecture."""
    if architecture is None:
        return small_model_folder()
    return random_checkpoint(architecture, folder)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Let vLLM for CPUs keep the weights of linear layers as they are loaded, with slower kernels."""
    from vllm.model_executor.layers import utils

    with replaced(utils.ops, "_supports_onednn", False), replaced(utils, "check_cpu_sgl_kernel", lambda *_: False):
        yield


def build(model: str, way: str, options: argparse.Namespace, **settings: Any) -> TreePOTrainer:
    """A trainer whose engine gets a LoRA policy in this way; `settings` are further ones, as for servers."""
    dtype, precision = number_type()
    name = "vllm_base_weights" if options.load_in_4bit else "vllm_lora_sync"
    engine = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, name: way.split(",")[0]}
    if settings.get("vllm_mode") == "server":
        del engine["vllm_gpu_memory_utilization"]
    args = TreePOConfig(
        output_dir=str(OUTPUTS / "weight_sync"),
        use_cpu=not torch.cuda.is_available(),
        **precision,
        report_to=[],
        per_device_train_batch_size=8,
        max_completion_length=64,
        use_vllm=True,
        vllm_max_model_length=1024,
        **{**engine, **settings},
        model_init_kwargs={"dtype": dtype},
    )
    return TreePOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["Hello"] * 8}),
        quantization_config=nf4_config() if options.load_in_4bit else None,
        peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"),
    )


def measure_speed(trainer: TreePOTrainer, options: argparse.Namespace) -> float:
    """Tokens per second of the engine; they do not depend on what its weights are."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = cast(LLM, trainer.vllm_generation.llm)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, temperature=1.0)
    prompts = [TokensPrompt(prompt_token_ids=[100 + i] * 32) for i in range(options.prompts)]
    llm.generate(prompts, params, use_tqdm=False)
    taken = [seconds(lambda: llm.generate(prompts, params, use_tqdm=False)) for _ in range(options.generations)]
    return options.prompts * options.tokens / statistics.median(taken)


def measure_syncs(trainer: TreePOTrainer, options: argparse.Namespace) -> list[float]:
    """Seconds of each synchronization."""
    model = cast(torch.nn.Module, trainer.model)
    times = []
    for _ in range(options.repeats + 1):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
        times.append(seconds(trainer.vllm_generation.sync_weights))
    return times[1:]


def row(way: str, trainer: TreePOTrainer, options: argparse.Namespace) -> str:
    """The way's line of the table."""
    speed = f"{measure_speed(trainer, options):.0f}"
    try:
        times = measure_syncs(trainer, options)
    except (AttributeError, KeyError, RuntimeError) as error:
        reason = f"this engine takes no pushed weights: {type(error).__name__}: {str(error)[:80]}"
        return table_row(way, reason, speed)
    return table_row(way, median_and_range([1000 * value for value in times], digits=1), speed)


def ways(options: argparse.Namespace) -> list[str]:
    """How an engine's policy is updated, or in 4 bits what base it has."""
    if options.load_in_4bit:
        return ["quantized", "dequantized"]
    return ["adapter", "merge"] if torch.cuda.is_available() else ["adapter", "merge", UNPACKED]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--architecture", choices=MODELS, help="random weights; SmolLM2-135M without it")
    parser.add_argument("--load_in_4bit", action="store_true", help="a QLoRA policy, and its engines")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=64, help="completions sampled at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--generations", type=int, default=3, help="times that these are sampled; the median counts")
    return parser.parse_args(arguments)


def main() -> None:
    """Print a row for each way."""
    options = parse_options()
    print(f"{options.architecture or 'SmolLM2-135M'}, rank {options.rank} on all linear layers, {device_name()}\n")
    print(table_head("way", "ms per synchronization, median (range)", "tokens/s of the engine"))
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(options.architecture, Path(folder))
        for way in ways(options):
            with plain_layers() if way == UNPACKED else nullcontext():
                trainer = build(model, way, options)
            print(row(way, trainer, options), flush=True)
            del trainer
            gc.collect()


if __name__ == "__main__":
    main()
