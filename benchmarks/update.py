"""
One update's forward and backward pass: packed rows against TRL's plain rows, time and peak memory.

    python -m benchmarks.update             # SmolLM2's architecture, one tree; 20 minutes on 2 cores
    python -m benchmarks.update --model small --unique 1024 4096 16384 32768 --ratios 2  # long rows
    python -m benchmarks.update --model qwen2.5-1.5b --lora 16 --gradient_checkpointing --dtype bfloat16  # GPU
    python -m benchmarks.update --model small --unique 256 --ratios 2 --repeats 1  # a quick look

A tree has 16 leaves with random tokens: a prompt, three doublings, then a tail of each leaf's own. The model's weights
are random too. "ratio" is leaf tokens per unique token. Plain rows go through TRL's own method in micro-batches of
each size in `--rows`. Packed rows go through `PackedForward` in one micro-batch, or in pieces of `--max_tokens`.

A first pass of each way warms up and measures memory. Then all ways run in turn in the same process; seconds are
medians. Peak memory is what a pass adds to the process (CPU) or to the device (CUDA). On a CPU the allocator is told
to keep freed memory, because fetching it anew from the system costs more than a large pass itself. Prints Markdown
tables.
"""

import argparse
import ctypes
import gc
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import device_name, make_parser, median_and_range, seconds, table_head, table_row
from benchmarks.random_models import MODELS
from treepo_trl.update.packed_forward import PackedForward
from treepo_trl.update.packing import pack_rows


LIBC = ctypes.CDLL(None)
WIDTH = 16
Batch = tuple[torch.Tensor, torch.Tensor, int]


def make_batch(num_unique: int, ratio: float, vocab_size: int, device: torch.device) -> Batch:
    """Rows of one tree with about that many unique tokens and that many leaf tokens per unique token."""
    length = num_unique * ratio / WIDTH  # of a row
    # prompt + (2 + 4 + 8) * segment + 16 * tail = num_unique and prompt + 3 * segment + tail = length
    prompt = length / 8 if ratio > 1.14 else (WIDTH * length - num_unique) / (WIDTH - 1)
    tail = (num_unique - prompt - 14 * (length - prompt) / 3) / (WIDTH - 14 / 3)
    if tail < 1:  # so much is shared that only a longer prompt can hold it
        prompt, tail = (14 * length / 3 - num_unique) / (14 / 3 - 1), 1
    prompt, tail = max(round(prompt), 1), max(round(tail), 1)
    segment = max(round((length - prompt - tail) / 3), 0)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(vocab_size, (count,), generator=generator)

    paths = [tokens(prompt)]
    for _ in range(3):
        paths = [torch.cat([path, tokens(segment)]) for path in paths for _ in range(2)]
    paths = [torch.cat([path, tokens(tail)]) for path in paths for _ in range(2)]
    rows = torch.stack(paths).to(device)
    return rows, torch.ones_like(rows), rows.size(1) - prompt


def make_model(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The architecture with random weights, TRL's fused LM head and what the options ask for."""
    torch.manual_seed(0)
    config = MODELS[args.model]
    config.max_position_embeddings = 65536
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, args.dtype))
    model = model.to(device)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=args.lora, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_ways(args: argparse.Namespace, model: torch.nn.Module, batch: Batch) -> dict[str, Callable[[], dict]]:
    """Each way to compute the gradient of the batch's log-probabilities; returns what PackedForward logs."""
    accelerator = Accelerator(cpu=batch[0].device.type == "cpu")
    trainer = SimpleNamespace(accelerator=accelerator)
    trl_method = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    weights = torch.randn(len(batch[0]), batch[2], device=batch[0].device)

    def plain(*arguments: Any, **options: Any) -> Any:
        return trl_method(trainer, *arguments, **options)

    def by_rows(rows: int) -> dict:
        for i in range(0, len(batch[0]), rows):
            ids, mask = batch[0][i : i + rows], batch[1][i : i + rows]
            logps, _, _ = plain(model, ids, mask, batch[2], compute_entropy=True)
            (logps * weights[i : i + rows]).sum().backward()
        return {}

    def packed(forward: PackedForward) -> dict:
        logps, _, _, log = forward(model, *batch, len(batch[0]), True, False, plain)
        (logps * weights).sum().backward()
        return log

    ways: dict[str, Callable[[], dict]] = {
        f"rows x {rows}": lambda rows=rows: by_rows(rows) for rows in args.rows if rows <= len(batch[0])
    }
    forwards = {f"packed, {packing}": PackedForward(packing, accelerator) for packing in args.packings}
    for tokens in args.max_tokens:
        name = f"packed, auto, pieces of {tokens}"
        forwards[name] = PackedForward("auto", accelerator, max_tokens=tokens)
    return ways | {name: lambda forward=forward: packed(forward) for name, forward in forwards.items()}


def peak_gib(run: Callable[[], dict]) -> float:
    """What a pass adds: resident memory of the process on a CPU, allocated memory of the device on CUDA."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    LIBC.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    run()
    return (resident_bytes("VmHWM") - before) / 2**30


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system."""
    for option, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
        LIBC.mallopt(option, value)


def measure(model: torch.nn.Module, run: Callable[[], dict]) -> tuple[float, float]:
    """Seconds of a pass, and of packing in it."""
    model.zero_grad(set_to_none=True)
    log = {}
    total = seconds(lambda: log.update(run()))
    return total, sum(log.get("tree/packing_seconds", []))


def measure_all(
    model: torch.nn.Module, ways: dict[str, Callable[[], dict]], repeats: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Seconds of each pass and of packing in it for every way, and the GiB that a way adds."""
    model.zero_grad(set_to_none=True)
    gib = {name: peak_gib(run) for name, run in ways.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            times[name].append(measure(model, run))
    return times, gib


def report(title: str, ratio: float, times: dict[str, list[tuple[float, float]]], gib: dict[str, float]) -> None:
    """Print the table of one tree."""
    medians = {name: statistics.median(total for total, _ in results) for name, results in times.items()}
    best = min(value for name, value in medians.items() if name.startswith("rows"))
    print(f"\n{title}\n")
    print(table_head("way", "s (lowest to highest)", "speed-up", "of the ratio", "peak GiB", "packing"))
    for name, results in times.items():
        speedup = best / medians[name]
        packing = statistics.median(part / total for total, part in results)
        cells = f"{speedup:.2f}", f"{speedup / ratio:.2f}", f"{gib[name]:.2f}", f"{packing:.2%}"
        print(table_row(name, median_and_range([total for total, _ in results]), *cells), flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unique", type=int, nargs="+", default=[2048], help="unique tokens of the tree")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 1.15, 1.3, 2.0, 2.6, 4.0, 8.0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="rows per micro-batch of plain rows")
    parser.add_argument("--packings", nargs="*", default=["sdpa", "auto"], help="values of tree_packing")
    parser.add_argument("--max_tokens", type=int, nargs="*", default=[], help="max_tokens_per_micro_batch")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure all cases and print a table of each."""
    args = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    model = make_model(args, device)
    machine = device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, {f'LoRA rank {args.lora}' if args.lora else 'all weights'}, ", end="")
    print(f"{'with' if args.gradient_checkpointing else 'no'} gradient checkpointing, {machine}")
    for num_unique in args.unique:
        for ratio in args.ratios:
            batch = make_batch(num_unique, ratio, MODELS[args.model].vocab_size, device)
            packed = pack_rows(*batch)
            times, gib = measure_all(model, make_ways(args, model, batch), args.repeats)
            title = f"{batch[0].size(1)} tokens per row, {packed.input_ids.size(1)} unique, ratio {packed.ratio:.2f}"
            report(title, packed.ratio, times, gib)


if __name__ == "__main__":
    main()
