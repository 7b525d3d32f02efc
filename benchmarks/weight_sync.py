"""
Seconds from an optimizer step to an engine that answers with the new policy: the adapter alone against TRL's way.

    python benchmarks/sync.py                              # SmolLM2-135M, on a CPU or a GPU
    python benchmarks/sync.py --architecture qwen2.5-1.5b  # random weights, for a GPU
    python benchmarks/sync.py --load_in_4bit               # QLoRA: the engine's base in 4 bits, and dequantized

Each way in a trainer of its own in one process, one after the other; the adapter changes before each synchronization,
and the first one, which compiles and allocates, is left out. TRL's way merges the adapter and pushes every weight.
vLLM for CPUs packs its weights for its kernels and can take none after that: there TRL's way comes twice, the second
time with layers as they are on CUDA. Before that the same prompts are sampled from both engines: with LoRA layers, and
with the plain layers of a merged model. In 4 bits both ways load the adapter alone, on the two kinds of base that
`vllm_base_weights` has.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from random_models import MODELS, random_checkpoint
from transformers import BitsAndBytesConfig

from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.policy.adapter_sync import replaced
from treepo_trl.quickstart.embedded import small_model


UNPACKED = "merge, layers not packed"
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def model_folder(architecture: str | None, folder: Path) -> str:
    """SmolLM2-135M-Instruct, or random weights of an architecture."""
    if architecture is None:
        return str(small_model(Path(".cache/smollm2-135m-instruct")))
    return random_checkpoint(architecture, folder)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Let vLLM for CPUs keep the weights of linear layers as they are loaded, with slower kernels."""
    from vllm.model_executor.layers import utils

    with replaced(utils.ops, "_supports_onednn", False), replaced(utils, "check_cpu_sgl_kernel", lambda *_: False):
        yield


def build(model: str, way: str, options: argparse.Namespace) -> TreePOTrainer:
    """A trainer whose engine gets a LoRA policy in this way."""
    use_cpu = not torch.cuda.is_available()
    args = TreePOConfig(
        output_dir="outputs/benchmarks/sync",
        use_cpu=use_cpu,
        bf16=not use_cpu,
        report_to=[],
        per_device_train_batch_size=8,
        max_completion_length=64,
        use_vllm=True,
        vllm_mode="colocate",
        **({"vllm_base_weights": way} if options.load_in_4bit else {"vllm_lora_sync": way.split(",")[0]}),
        vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=1024,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    return TreePOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["Hello"] * 8}),
        quantization_config=FOUR_BITS if options.load_in_4bit else None,
        peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"),
    )


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call, with the device's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_speed(trainer: TreePOTrainer, options: argparse.Namespace) -> float:
    """Tokens per second of the engine; they do not depend on what its weights are."""
    from vllm import SamplingParams

    generation: Any = trainer.vllm_generation
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, temperature=1.0)
    prompts = [{"prompt_token_ids": [100 + i] * 32} for i in range(options.prompts)]
    generation.llm.generate(prompts, params, use_tqdm=False)
    taken = [
        seconds(lambda: generation.llm.generate(prompts, params, use_tqdm=False)) for _ in range(options.generations)
    ]
    return options.prompts * options.tokens / statistics.median(taken)


def measure_syncs(trainer: TreePOTrainer, options: argparse.Namespace) -> list[float]:
    """Seconds of each synchronization."""
    times = []
    for _ in range(options.repeats + 1):
        for parameter in trainer.model.parameters():
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
        return f"| {way} | this engine takes no pushed weights: {type(error).__name__}: {str(error)[:80]} | {speed} |"
    low, mid, high = (1000 * value for value in (min(times), statistics.median(times), max(times)))
    return f"| {way} | {mid:.1f} ({low:.1f} to {high:.1f}) | {speed} |"


def ways(options: argparse.Namespace) -> list[str]:
    """How an engine's policy is updated, or in 4 bits what base it has."""
    if options.load_in_4bit:
        return ["quantized", "dequantized"]
    return ["adapter", "merge"] if torch.cuda.is_available() else ["adapter", "merge", UNPACKED]


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--architecture", choices=MODELS, help="random weights; SmolLM2-135M without it")
    parser.add_argument("--load_in_4bit", action="store_true", help="a QLoRA policy, and its engines")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=64, help="completions sampled at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--generations", type=int, default=3, help="times that these are sampled; the median counts")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{options.architecture or 'SmolLM2-135M'}, rank {options.rank} on all linear layers, {device}\n")
    print("| way | ms per synchronization, median (range) | tokens/s of the engine |")
    print("|---|---|---|")
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
