"""
The tree sampler's own time and memory, with an engine that answers at once.

    python -m benchmarks.sampler               # all sizes
    python -m benchmarks.sampler --with_text   # with stop pattern and repetition check
    python -m benchmarks.sampler --sizes 24    # a quick look

Completions have geometric lengths and are cut at twice their mean, which is 14 segments. The Markdown table shows the
seconds outside the engine, the same per million decoded tokens, and the bytes that the trees hold per unique token.
Token ids and log-probabilities themselves are not counted, since they belong to the engine's results. In CPython they
take 28 and 24 bytes each where they are not shared.
"""

import gc
import random
import tracemalloc
from collections.abc import Callable

from benchmarks.common import make_parser, table_head, table_row
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult


EOS = 0
WIDTH = 16
MEAN_LENGTHS = {24: 3600, 64: 8192, 128: 8192, 256: 8192, 512: 8192}
"""Mean length of a completion in tokens for each number of prompts."""


class InstantEngine(SegmentEngine):
    """Segments of random length from precomputed tokens; its own time does not count."""

    block_size = 16

    def __init__(self, mean_length: int, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.stop_probability = 1 / mean_length
        self.tokens = [self.rng.randrange(1, 50_000) for _ in range(2**16)]
        self.pending: list[SegmentRequest] = []

    def num_slots(self, length: int) -> int | None:
        return 1024  # vLLM's default on large GPUs

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.pending.extend(requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
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
    """Seconds outside the engine, decoded tokens, and bytes that the trees hold per unique token."""
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
    parser = make_parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", choices=MEAN_LENGTHS, default=list(MEAN_LENGTHS), help="prompts"
    )
    parser.add_argument("--with_text", action="store_true", help="with stop pattern and repetition check")
    args = parser.parse_args()
    names = "prompts", "leaves", "mean length", "s outside the engine", "s per million tokens", "bytes per token"
    print(table_head(*names))
    for num_prompts in args.sizes:
        mean_length = MEAN_LENGTHS[num_prompts]
        seconds, num_tokens, size = measure(num_prompts, WIDTH, mean_length, args.with_text)
        per_million = seconds / num_tokens * 1e6
        cells = f"{seconds:.2f}", f"{per_million:.3f}", f"{size:.1f}"
        print(table_row(num_prompts, WIDTH, mean_length, *cells), flush=True)


if __name__ == "__main__":
    main()
