"""
Host time of the tree sampler outside the engine, with an engine that answers at once.

    python benchmarks/sampler_overhead.py

Completions have geometric lengths, cut at a cap of twice their mean, in 14 segments per cap. Prints a Markdown table:
seconds outside the engine, in all and per million unique tokens, and the memory that the trees hold per unique token,
without the numbers themselves, which belong to the engine's results (in CPython 28 bytes for a token id and 24 for a
log-probability, where they are not shared).
"""

import argparse
import gc
import random
import tracemalloc

from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentRequest, SegmentResult


EOS = 0


class InstantEngine:
    """Segments of random length from precomputed tokens; its own time does not count."""

    context_length = None
    num_cache_tokens = None
    block_size = 16
    reports_entropies = False
    num_prompt_tokens = 0
    num_cached_tokens = 0

    def __init__(self, mean_length: int, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.stop_probability = 1 / mean_length
        self.tokens = [self.rng.randrange(1, 50_000) for _ in range(2**16)]
        self.pending: list[SegmentRequest] = []

    def num_slots(self, length: int) -> int | None:
        return 1024  # vLLM's default on large GPUs

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.pending.extend(requests)

    def collect(self) -> list[SegmentResult]:
        results = []
        for request in self.pending:
            length = int(self.rng.expovariate(self.stop_probability)) + 1
            stops = length <= request.max_tokens
            length = min(length, request.max_tokens)
            start = self.rng.randrange(len(self.tokens) - length)
            tokens = self.tokens[start : start + length]
            if stops:
                tokens[-1] = EOS
            results.append(SegmentResult(request.request_id, tokens, [-1.0] * length, "stop" if stops else "length"))
        self.pending = []
        return results

    def abort(self) -> None:
        self.pending = []


def measure(num_prompts: int, width: int, mean_length: int, with_text: bool) -> tuple[float, int, float]:
    """Seconds outside the engine, unique tokens, and bytes held by the result per unique token."""
    cap = 2 * mean_length
    config = TreeSamplingConfig(
        num_generations=width,
        max_completion_length=cap,
        stop_repetition=with_text,
        stop_pattern=r"\\boxed\{[^}]*\}" if with_text else None,
    )

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    prompts = [[1 + i] * 100 for i in range(num_prompts)]
    sampler = TreeSampler(InstantEngine(mean_length), config, [EOS], decode)
    sampler.sample(prompts, seed=0)
    seconds, num_tokens = sampler.stats.seconds - sampler.stats.engine_seconds, sampler.stats.num_decoded_tokens
    gc.collect()
    tracemalloc.start()
    trees = sampler.sample(prompts[: max(num_prompts // 16, 1)], seed=0)  # tracing is slow: a part is enough
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    unique = sum(tree.num_unique_tokens for tree in trees)
    return seconds, num_tokens, size / unique


def main() -> None:
    """Measure a few sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--with_text", action="store_true", help="with stop pattern and repetition check")
    args = parser.parse_args()
    print("| prompts | leaves | mean length | s outside the engine | s per million tokens | bytes per token |")
    print("|---|---|---|---|---|---|")
    sizes = ((24, 16, 3600), (64, 16, 8192), (128, 16, 8192), (256, 16, 8192), (512, 16, 8192))
    for num_prompts, width, mean_length in sizes:
        seconds, num_tokens, size = measure(num_prompts, width, mean_length, args.with_text)
        per_million = seconds / num_tokens * 1e6
        print(f"| {num_prompts} | {width} | {mean_length} | {seconds:.2f} | {per_million:.3f} | {size:.1f} |")


if __name__ == "__main__":
    main()
