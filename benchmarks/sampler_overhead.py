"""
Host time of the tree sampler outside the engine, with an engine that answers at once.

    python benchmarks/sampler_overhead.py

Completions have geometric lengths, cut at a cap of twice their mean, in 14 segments per cap. Prints a Markdown table:
seconds outside the engine, and the process's peak memory beyond what it held before, per unique token.
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
    reports_entropies = False
    num_prompt_tokens = 0
    num_cached_tokens = 0

    def __init__(self, mean_length: int, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.stop_probability = 1 / mean_length
        self.tokens = [self.rng.randrange(1, 50_000) for _ in range(2**16)]
        self.pending: list[SegmentRequest] = []

    def num_slots(self, length: int) -> int | None:
        return None

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
    seconds = sampler.stats.seconds - sampler.stats.engine_seconds
    gc.collect()
    tracemalloc.start()
    trees = sampler.sample(prompts[: max(num_prompts // 16, 1)], seed=0)  # tracing is slow: a part is enough
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    unique = sum(tree.num_unique_tokens for tree in trees)
    return seconds, sampler.stats.num_decoded_tokens, size / unique


def main() -> None:
    """Measure a few sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--with_text", action="store_true", help="with stop pattern and repetition check")
    args = parser.parse_args()
    print("| prompts | leaves | mean length | s outside the engine | bytes per unique token |")
    print("|---|---|---|---|---|")
    for num_prompts, width, mean_length in ((24, 16, 3600), (64, 16, 2048), (128, 16, 4096), (512, 16, 8192)):
        seconds, _, size = measure(num_prompts, width, mean_length, args.with_text)
        print(f"| {num_prompts} | {width} | {mean_length} | {seconds:.2f} | {size:.1f} |")


if __name__ == "__main__":
    main()
