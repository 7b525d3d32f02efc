"""What sampling cost: reports on trees and on ordinary completions of the same engine, side by side."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import get_args

from treepo_trl.engines import SegmentEngine, SegmentRequest
from treepo_trl.sampling.config import TreeSamplingConfig
from treepo_trl.sampling.nodes import TokenReason
from treepo_trl.sampling.sampler import SamplingStats, completion_cap
from treepo_trl.sampling.tree import SegmentTree


def sample_independent(
    engine: SegmentEngine,
    prompts: list[list[int]],
    config: TreeSamplingConfig,
    on_leaves: Callable[[int], None] | None = None,
    on_tree: Callable[[int, SegmentTree], None] | None = None,
) -> tuple[list[SegmentTree], SamplingStats]:
    """
    Ordinary sampling with the same engine: `num_generations` completions of each prompt, all submitted at once.

    Each completion is one request, as in `vllm.LLM.generate` with `n`; no early stop but EOS and the cap. The
    callbacks are those of [`TreeSampler.sample`].

    Returns:
        Trees without branches, and what they cost.
    """
    started = time.perf_counter()
    num_prompt_tokens, num_cached_tokens = engine.num_prompt_tokens, engine.num_cached_tokens
    trees = [SegmentTree(prompt) for prompt in prompts]
    stats = SamplingStats(num_segments=len(prompts) * config.num_generations)
    requests: list[SegmentRequest] = []
    for i, prompt in enumerate(prompts):
        cap = completion_cap(engine, config, prompt)
        first = i * config.num_generations
        requests += [SegmentRequest(first + j, prompt, cap, tree=i) for j in range(config.num_generations)]
    with closing(engine.complete(requests)) as results:  # an error of the callback aborts too
        for result in results:
            index = result.request_id // config.num_generations
            tree = trees[index]
            tree.add(None, result.token_ids, result.logprobs, result.finish_reason)
            stats.num_decoded_tokens += len(result.token_ids)
            if on_leaves is not None:
                on_leaves(1)
            if on_tree is not None and len(tree.leaves) == config.num_generations:
                on_tree(index, tree)
    stats.num_prompt_tokens = engine.num_prompt_tokens - num_prompt_tokens
    stats.num_cached_tokens = engine.num_cached_tokens - num_cached_tokens
    stats.seconds = stats.engine_seconds = time.perf_counter() - started
    return trees, stats


@dataclass(frozen=True)
class RolloutReport:
    """What one way of sampling produced and cost."""

    prompts: int
    leaves: int
    finish_reasons: dict[str, int]
    """Leaves per reason."""
    decoded_tokens: int
    """Tokens that the engine sampled."""
    unique_tokens: int
    """Completion tokens kept, each node once."""
    leaf_tokens: int
    """Completion tokens of the leaves, each leaf in full."""
    prompt_tokens: int
    """Tokens of all requests."""
    cached_tokens: int
    """Those of `prompt_tokens` that the engine did not compute again."""
    seconds: float

    @property
    def leaves_per_second(self) -> float:
        """Trajectories per second."""
        return self.leaves / self.seconds

    @property
    def decoded_tokens_per_second(self) -> float:
        """Sampled tokens per second."""
        return self.decoded_tokens / self.seconds

    @property
    def decoded_tokens_per_leaf(self) -> float:
        """Sampled tokens for one trajectory."""
        return self.decoded_tokens / max(self.leaves, 1)


def report(trees: Sequence[SegmentTree], stats: SamplingStats) -> RolloutReport:
    """Counts over trees and the statistics of the call that sampled them."""
    reasons = Counter(str(tree.nodes[leaf].finish_reason) for tree in trees for leaf in tree.leaves)
    return RolloutReport(
        prompts=len(trees),
        leaves=reasons.total(),
        finish_reasons={reason: reasons[reason] for reason in get_args(TokenReason) if reasons[reason]},
        decoded_tokens=stats.num_decoded_tokens,
        unique_tokens=sum(tree.num_unique_tokens for tree in trees),
        leaf_tokens=sum(tree.num_leaf_tokens for tree in trees),
        prompt_tokens=stats.num_prompt_tokens,
        cached_tokens=stats.num_cached_tokens,
        seconds=stats.seconds,
    )


_ROWS: dict[str, Callable[[RolloutReport], float]] = {
    "prompts": lambda r: r.prompts,
    "trajectories (leaves)": lambda r: r.leaves,
    **{
        f"  ended by {reason}": lambda r, reason=reason: r.finish_reasons.get(reason, 0)
        for reason in get_args(TokenReason)
    },
    "decoded tokens": lambda r: r.decoded_tokens,
    "decoded tokens / trajectory": lambda r: r.decoded_tokens_per_leaf,
    "unique tokens": lambda r: r.unique_tokens,
    "leaf tokens": lambda r: r.leaf_tokens,
    "tokens of all requests": lambda r: r.prompt_tokens,
    "  of these cached": lambda r: r.cached_tokens,
    "seconds": lambda r: r.seconds,
    "trajectories / s": lambda r: r.leaves_per_second,
    "decoded tokens / s": lambda r: r.decoded_tokens_per_second,
}


def format_table(columns: dict[str, list[RolloutReport]]) -> str:
    """
    Markdown table of reports, a column per way of sampling; medians over the repeats of each.

    With two ways the last column is the ratio of the first to the second.
    """
    names = list(columns)
    rows = [["", *names, *([" / ".join(names)] if len(names) == 2 else [])]]
    for label, value in _ROWS.items():
        values = [statistics.median(value(report) for report in columns[name]) for name in names]
        cells = [_number(value) for value in values]
        if len(names) == 2:
            cells.append(f"{values[0] / values[1]:.3f}" if values[1] else "-")
        rows.append([label, *cells])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table of cells with a head; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "-" * (widths[0] + 2) + "".join("|" + "-" * (width + 1) + ":" for width in widths[1:]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
