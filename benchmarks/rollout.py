"""
Trees against independent sampling on the same engine, in one process: trajectories per second and tokens decoded.

    python -m benchmarks.rollout                                   # SmolLM2-135M, fixed and ragged lengths
    python -m benchmarks.rollout --model Qwen/Qwen2.5-1.5B-Instruct --prompts 64 --length 1024
    python -m benchmarks.rollout --prompts 1 --length 32 --lengths fixed --ways early --repeats 1  # a quick look

Values of `--lengths`, the length of a completion:

- `fixed`: the cap.
- `ragged`: lognormal (sigma 0.5) with a mean of half the cap. What remains of a path is drawn given its length so far.
- `model`: the model ends its answers to arithmetic tasks.

Values of `--ways`; `independent` always runs too, with one request per completion and all submitted at once:

- `early`, `sqrt`, `spread`: trees with that schedule, which may lack leaves, as in a training.
- `sqrt+root`: missing leaves start again at the prompt when all others are done.
- `early+barrier`, `spread+barrier`: all trees wait for each other after each segment.
- `early+unaligned`, `spread+unaligned`: segments end anywhere in a block of the engine's cache.
- `spread+cap`: the branches of ragged lengths are spread over the cap instead of the mean.

Widths of `sqrt` are those that the samplings before have shown, a first one that is not timed among them. Ways take
turns. Prints a Markdown table with medians of the repeats.
"""

import math
import random
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast
from unittest.mock import patch

import torch
from accelerate import Accelerator
from transformers import TrainerState

from benchmarks.common import (
    device_name,
    make_parser,
    median_and_range,
    small_model_folder,
    table_head,
    table_row,
)
from benchmarks.report.stages.speculation import NGRAM, SUFFIX
from treepo_trl import SegmentTree, TreePOConfig, TreeSampler
from treepo_trl.apps.sample.cost_table import RolloutReport, report, sample_independent
from treepo_trl.batch.width_schedule import WidthSchedule
from treepo_trl.command_line.engine import EngineArguments, build_engine, load_tokenizer
from treepo_trl.command_line.prompts import prompt_token_ids
from treepo_trl.engines import SamplingOptions, SegmentEngine, SegmentRequest, SegmentResult
from treepo_trl.quickstart import addition_tasks
from treepo_trl.sampling.branching import BranchSchedule


if TYPE_CHECKING:
    from treepo_trl.engines.transformers import TransformersEngine
    from treepo_trl.engines.vllm import VLLMEngine

SIGMA = 0.5


class Wrapped(SegmentEngine):
    """An engine that passes everything on to another one."""

    def __init__(self, engine: SegmentEngine) -> None:
        self.engine = engine
        self.context_length = engine.context_length
        self.num_cache_tokens = engine.num_cache_tokens
        self.block_size = engine.block_size
        self.reports_entropies = engine.reports_entropies

    @property
    def num_prompt_tokens(self) -> int:
        return self.engine.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self.engine.num_cached_tokens

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.engine.submit(requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        return self.engine.collect(wake)

    def abort(self) -> None:
        self.engine.abort()

    def num_slots(self, length: int) -> int | None:
        return self.engine.num_slots(length)

    def end_tree(self, tree: int) -> None:
        self.engine.end_tree(tree)

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()


class BarrierEngine(Wrapped):
    """Returns results only when everything that was submitted is done."""

    in_flight = 0

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.in_flight += len(requests)
        self.engine.submit(requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        results: list[SegmentResult] = []
        while self.in_flight:
            new = self.engine.collect(wake)
            self.in_flight -= len(new)
            results += new
        return results


class UnalignedEngine(Wrapped):
    """Does not tell where its cache blocks end."""

    def __init__(self, engine: SegmentEngine) -> None:
        super().__init__(engine)
        self.block_size = None


class RaggedEngine(Wrapped):
    """Ends paths at lengths of its own: lognormal with a given mean, given that a path has got as far as it has."""

    def __init__(self, engine: SegmentEngine, mean: float, prompt_length: int, eos: int, seed: int) -> None:
        super().__init__(engine)
        self.distribution = statistics.NormalDist(math.log(mean) - SIGMA**2 / 2, SIGMA)
        self.prompt_length, self.eos = prompt_length, eos
        self.rng = random.Random(seed)
        self.ending: set[int] = set()

    def submit(self, requests: list[SegmentRequest]) -> None:
        changed = []
        for request in requests:
            so_far = len(request.token_ids) - self.prompt_length
            below = self.distribution.cdf(math.log(so_far)) if so_far else 0.0
            quantile = min(below + (1.0 - below) * self.rng.random(), 1.0 - 1e-9)
            rest = max(math.ceil(math.exp(self.distribution.inv_cdf(quantile))) - so_far, 1)
            if rest <= request.max_tokens:
                self.ending.add(request.request_id)
                request = replace(request, max_tokens=rest)
            changed.append(request)
        self.engine.submit(changed)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        results = []
        for result in self.engine.collect(wake):
            if result.request_id in self.ending:
                self.ending.remove(result.request_id)
                tokens = [*result.token_ids[:-1], self.eos]
                result = SegmentResult(result.request_id, tokens, result.logprobs, "stop")
            results.append(result)
        return results


class Sampling(NamedTuple):
    """What one sampling of all prompts has cost, and what serial work was in it."""

    cost: RolloutReport
    serial_segments: int = 1
    longest_path: int = 1


class Lengths:
    """Lengths that the samplings of a way have shown so far, for the widths of its next trees."""

    def __init__(self, config: TreePOConfig) -> None:
        self._schedule, self._state = WidthSchedule(config), TrainerState()

    def widths(self) -> list[float] | None:
        return self._schedule.widths(self._state)

    def learn(self, trees: list[SegmentTree]) -> None:
        """Rewards are not known, and the widths are of the lengths alone."""
        mean = statistics.mean(tree.mean_length() for tree in trees)
        unknown = [[math.nan] * len(tree.leaves) for tree in trees]
        self._schedule.learn(self._state, mean, trees, unknown, Accelerator(cpu=True))


def sample(
    way: str,
    engine: SegmentEngine,
    prompts: list[list[int]],
    args: Namespace,
    eos: list[int],
    seed: int,
    lengths: dict[str, Lengths],
) -> Sampling:
    """Sample all prompts in one of the ways."""
    engine.reset_prefix_cache()
    schedule, _, change = way.partition("+")
    config = TreePOConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=args.width,
        num_generations=args.width,
        max_completion_length=args.length,
        segment_length=args.segment_length,
        branch_schedule=cast(BranchSchedule, "early" if schedule == "independent" else schedule),
        branching_policy=args.policy,
        fallback_policy="root" if change == "root" else "none",
        stop_repetition=False,
    )
    if schedule == "independent":
        return Sampling(report(*sample_independent(engine, prompts, config)))
    expected = args.length // 2 if isinstance(engine, RaggedEngine) and change != "cap" else None
    if change in ("barrier", "unaligned"):
        engine = {"barrier": BarrierEngine, "unaligned": UnalignedEngine}[change](engine)
    sampler, known = TreeSampler(engine, config, eos), lengths.setdefault(way, Lengths(config))
    trees = sampler.sample(prompts, seed, expected_length=expected, widths=known.widths())
    known.learn(trees)
    longest = max(tree.nodes[leaf].depth + 1 for tree in trees for leaf in tree.leaves)
    return Sampling(report(trees, sampler.stats), sampler.stats.num_serial_segments, longest)


def print_table(runs: dict[str, list[Sampling]]) -> None:
    """Medians of each way, and what they are of independent sampling."""
    names = "seconds", "of independent", "decoded tokens", "of independent", "leaves per prompt", "serial segments"
    print(table_head("way", *names, "longest path"))

    def medians(samplings: list[Sampling]) -> tuple[float, float]:
        costs = [each.cost for each in samplings]
        return statistics.median(c.seconds for c in costs), statistics.median(c.decoded_tokens for c in costs)

    base_seconds, base_tokens = medians(runs["independent"])
    for way, samplings in runs.items():
        seconds, tokens = medians(samplings)
        leaves = statistics.mean(each.cost.leaves / each.cost.prompts for each in samplings)
        serial = [statistics.mean(each[i] for each in samplings) for i in (1, 2)]
        cells = f"{seconds / base_seconds:.2f}", f"{tokens:.0f}", f"{tokens / base_tokens:.2f}", f"{leaves:.1f}"
        spread = median_and_range([each.cost.seconds for each in samplings])
        print(table_row(way, spread, *cells, *(f"{each:.1f}" for each in serial)))


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """Options, of the command line if none are given."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="hub id or folder; default: the small model that comes with packages")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=89)  # in the middle of a cache block
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="cap on a completion")
    parser.add_argument("--segment_length", type=int, help="default: a sixteenth of the cap")
    parser.add_argument("--policy", default="uniform", choices=["uniform", "low_prob", "high_prob", "entropy"])
    parser.add_argument("--lengths", nargs="+", default=["fixed", "ragged"], choices=["fixed", "ragged", "model"])
    parser.add_argument("--ways", nargs="+", default=["sqrt", "sqrt+root", "early", "spread"])
    parser.add_argument("--max_num_seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speculation", choices=["ngram", "suffix"], help="vLLM guesses tokens, of all ways")
    args = parser.parse_args(arguments)
    args.segment_length = args.segment_length or math.ceil(args.length / 16)
    args.model = args.model or small_model_folder()
    return args


class Bench(NamedTuple):
    """An engine, and the prompts and the engine around it for every kind of lengths."""

    engine: "TransformersEngine | VLLMEngine"
    eos: int
    by_lengths: dict[str, tuple[SegmentEngine, list[list[int]]]]


@contextmanager
def speculation(method: str | None) -> Iterator[None]:
    """Let engines that are built guess tokens; on a processor with a kernel that writes their temperatures."""
    if method is None:
        yield
        return
    import vllm

    guesses = NGRAM if method == "ngram" else SUFFIX
    kernel = nullcontext()
    if not torch.cuda.is_available():
        kernel = patch("vllm.utils.cpu_triton_utils._expand_kernel_impl", expand)
    with patch("vllm.LLM", partial(vllm.LLM, speculative_config=guesses)), kernel:
        yield


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replaced: float,
    by: float,
    *_: object,
    **__: object,
) -> None:
    """
    Each request's value for each of its guessed tokens, in place.

    That of vLLM for processors (0.31, 0.32) writes into a copy unless the values are integers. So the temperatures of
    guessed tokens are whatever was in memory, and what is sampled is not the model.
    """
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    output.copy_(values.masked_fill(values == replaced, by).repeat_interleave(counts))


def build(args: Namespace) -> Bench:
    """Load the model."""
    arguments = EngineArguments(
        model_name_or_path=args.model,
        engine=args.engine,
        dtype=args.dtype,
        vllm_max_num_seqs=args.max_num_seqs,
        vllm_max_model_length=args.length + max(args.prompt_length, 256),
    )
    tokenizer = load_tokenizer(arguments)
    eos = cast(int, tokenizer.eos_token_id)
    with speculation(args.speculation):
        built = build_engine(arguments, [], SamplingOptions(), with_entropies=args.policy == "entropy")
    base = cast("TransformersEngine | VLLMEngine", built)  # both have EOS tokens that can be set
    rng = random.Random(0)
    noise = [[rng.randrange(100, 10_000) for _ in range(args.prompt_length)] for _ in range(args.prompts)]
    tasks, _ = addition_tasks(args.prompts, 1, seed=0)
    by_lengths: dict[str, tuple[SegmentEngine, list[list[int]]]] = {
        "fixed": (base, noise),
        "ragged": (RaggedEngine(base, args.length / 2, args.prompt_length, eos, seed=0), noise),
        "model": (base, prompt_token_ids(list(tasks["prompt"]), tokenizer)),
    }
    return Bench(base, eos, by_lengths)


def compare(bench: Bench, lengths: str, args: Namespace) -> Iterator[tuple[str, Sampling]]:
    """Reports of every way, which take turns, independent sampling first."""
    engine, prompts = bench.by_lengths[lengths]
    bench.engine.eos_token_ids = frozenset([bench.eos] if lengths == "model" else [])
    eos = [] if lengths == "fixed" else [bench.eos]
    known: dict[str, Lengths] = {}
    for repeat in range(args.repeats + 1):
        for way in ["independent", *args.ways]:
            result = sample(way, engine, prompts, args, eos, repeat, known)
            print(f"{lengths} {way}: {result.cost.seconds:.1f} s", file=sys.stderr)
            if repeat:  # the first one warms up
                yield way, result


def main() -> None:
    """Build the engine once and measure every kind of lengths."""
    args = parse_options()
    bench = build(args)
    for lengths in args.lengths:
        runs: dict[str, list[Sampling]] = {}
        for way, result in compare(bench, lengths, args):
            runs.setdefault(way, []).append(result)
        print(
            f"\n{device_name()}, {args.engine}, {Path(args.model).name}: {args.prompts} prompts of "
            f"{len(bench.by_lengths[lengths][1][0])} tokens x {args.width}, cap {args.length}, segments of "
            f"{args.segment_length}, {lengths} lengths, {args.max_num_seqs} slots, {args.repeats} repeats\n"
        )
        print_table(runs)


if __name__ == "__main__":
    main()
