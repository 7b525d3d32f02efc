"""
Grow the trees of many prompts over one engine: Algorithm 1 of [TreePO](https://huggingface.co/papers/2508.17445).

The levels of one tree wait for each other, trees never do: a tree's next level is ready as soon as its own last
segment has arrived. The engine's slots are filled with the oldest trees first, as many as its cache holds, so that
trees finish and free their part of it. Knows no model and no trainer.
"""

import heapq
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field

from treepo_trl.engines.base import SegmentEngine, SegmentEngineError, SegmentRequest, SegmentResult

from .config import TreeSamplingConfig
from .cutting import TreeRules
from .first_widths import first_widths
from .growing_tree import GrowingTree
from .tree import SegmentTree
from .turns import TurnHandler


@dataclass
class SamplingStats:
    """What one call of `TreeSampler.sample` did."""

    num_decoded_tokens: int = 0
    """Tokens that the engine sampled, those cut off behind a stop pattern included."""
    num_segments: int = 0
    """Requests sent to the engine."""
    num_fallback_leaves: int = 0
    """Leaves that a fallback added."""
    num_serial_segments: int = 0
    """Segments that the tree which took most had to decode one after the other."""
    num_prompt_tokens: int = 0
    """Tokens of all requests together: prompts, and paths that were continued."""
    num_cached_tokens: int = 0
    """Part of `num_prompt_tokens` that the engine did not have to compute again."""
    seconds: float = 0.0
    """Wall time of the call."""
    engine_seconds: float = 0.0
    """Part of `seconds` spent inside the engine."""
    tool_seconds: float = 0.0
    """Part of `seconds` in which the engine stood still because every tree waited for answers."""


def completion_cap(engine: SegmentEngine, config: TreeSamplingConfig, prompt: list[int]) -> int:
    """Longest completion of a prompt in tokens: `max_completion_length`, or what the engine's context leaves of it."""
    if engine.context_length is None:
        return config.max_completion_length
    return min(config.max_completion_length, engine.context_length - len(prompt))


@dataclass
class _Run:
    """State of one call of `TreeSampler.sample`."""

    trees: list[GrowingTree]
    num_started: int = 0
    unfinished: set[int] = field(default_factory=set[int])
    """Trees that were started and are not done."""
    ready: list[int] = field(default_factory=list[int])
    """Heap of the trees with segments that no slot was free for."""
    in_flight: dict[int, tuple[int, int, int]] = field(default_factory=dict[int, tuple[int, int, int]])
    """Request id -> (tree, position in its level, tokens of the sequence when it is done)."""
    waiting: set[int] = field(default_factory=set[int])
    """Trees whose level lacks nothing but answers."""
    current: int | None = None
    """Tree that is being looked at outside the engine."""


class TreeSampler:
    """
    Samples one [`SegmentTree`] per prompt with exactly `config.num_generations` leaves each.

    Fewer leaves are possible only with `fallback_policy="none"` and with `max_tree_tokens`.

    Args:
        engine ([`~treepo_trl.engines.SegmentEngine`]):
            Engine that continues token sequences.
        config ([`TreeSamplingConfig`] or [`TreePOConfig`]):
            Tree shape: segments, branching, fallback and early stop.
        eos_token_ids (`list[int]`):
            Every token that ends a completion.
        decode (`Callable[[list[int]], str]`, *optional*):
            Text of a list of tokens, such as `text_decoder(tokenizer)`; needed for `stop_pattern` and
            `stop_repetition`.

    Attributes:
        stats ([`SamplingStats`]):
            Counts and times of the last call of `sample`.

    Raises:
        ValueError: if a text rule is configured and `decode` is missing, or `branching_policy="entropy"` and the
            engine reports no entropies.

    Example:

    ```python
    >>> from treepo_trl import TreeSampler, TreeSamplingConfig
    >>> from treepo_trl.engines.transformers import TransformersEngine
    >>> from treepo_trl.sampling import text_decoder

    >>> engine = TransformersEngine(model, [tokenizer.eos_token_id])  # doctest: +SKIP
    >>> config = TreeSamplingConfig(num_generations=16, max_completion_length=1024, branch_schedule="spread")
    >>> decode = text_decoder(tokenizer)  # doctest: +SKIP
    >>> sampler = TreeSampler(engine, config, [tokenizer.eos_token_id], decode)  # doctest: +SKIP
    >>> (tree,) = sampler.sample([tokenizer("1 + 1 =")["input_ids"]], seed=0)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        engine: SegmentEngine,
        config: TreeSamplingConfig,
        eos_token_ids: list[int],
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if decode is None and (config.stop_pattern is not None or config.stop_repetition):
            raise ValueError(
                "`stop_pattern` and `stop_repetition` look at text: pass `decode` to the `TreeSampler`, or unset "
                "both (`stop_repetition` is on by default)."
            )
        if config.branching_policy == "entropy" and not engine.reports_entropies:
            raise ValueError(
                "`branching_policy='entropy'` needs an engine that reports entropies: build it with "
                "`with_entropies=True`."
            )
        self.engine = engine
        self.config = config
        self.decode = decode
        self.stats = SamplingStats()
        self._rules = TreeRules(config, frozenset(eos_token_ids), decode)

    def sample(
        self,
        prompts: list[list[int]],
        seed: int | str,
        *,
        progress: float = 0.0,
        expected_length: int | None = None,
        widths: Sequence[float] | None = None,
        turns: TurnHandler | None = None,
        on_leaves: Callable[[int], None] | None = None,
        on_tree: Callable[[int, SegmentTree], None] | None = None,
    ) -> list[SegmentTree]:
        """
        Sample a tree for each prompt.

        Args:
            prompts (`list[list[int]]`):
                Token ids of the prompts.
            seed (`int` or `str`):
                Seed of every branching and fallback draw. The engine's own sampling is not seeded here; the same seed
                and the same segments give the same trees, whatever the order in which segments arrive.
            progress (`float`):
                Fraction of the training that is done, for `branching_temperature_end`.
            expected_length (`int`, *optional*):
                Expected tokens of a completion, for the schedule `spread`; `expected_completion_length` of the config
                goes first.
            widths (sequence of `float`, *optional*):
                Paths per unit of leaf weight at each depth, for the schedule `sqrt`; by default those of paths that
                all have the expected length.
            turns ([`~treepo_trl.sampling.turns.TurnHandler`], *optional*):
                Answers turns, such as tools do; without it an EOS token ends a path.
            on_leaves (`Callable[[int], None]`, *optional*):
                Called with the number of paths that have just ended.
            on_tree (`Callable[[int, SegmentTree], None]`, *optional*):
                Called with each tree that is done and the index of its prompt, in order of completion.

        Returns:
            `list[SegmentTree]`: one tree per prompt, in the order of the prompts.

        Raises:
            ValueError: if a prompt is empty or leaves no room for a completion in the engine's context. Whatever an
                engine, an answer or a callback raises passes through, after everything in flight was aborted and with
                a note that names the prompt.
        """
        self.stats = SamplingStats()
        started = time.perf_counter()
        engine = self.engine
        num_prompt_tokens, num_cached_tokens = engine.num_prompt_tokens, engine.num_cached_tokens
        if self.config.expected_completion_length is not None:
            expected_length = self.config.expected_completion_length
        run = _Run(
            [
                GrowingTree(
                    self._rules,
                    SegmentTree(prompt),
                    random.Random(f"{seed}/{index}"),
                    self._max_length(prompt, index),
                    expected_length,
                    progress,
                    engine.block_size,
                    self._widths(widths, expected_length),
                    index,
                    turns,
                )
                for index, prompt in enumerate(prompts)
            ]
        )
        try:
            self._fill(run)
            while run.in_flight or run.waiting:
                for index in self._collect(run, turns is not None):
                    self._advance(run, index, on_leaves, on_tree)
                self._fill(run)
        except BaseException as error:
            self._abort(run, error, turns)
            raise
        self.stats.num_decoded_tokens = sum(grown.num_decoded_tokens for grown in run.trees)
        self.stats.num_fallback_leaves = sum(grown.num_fallback_leaves for grown in run.trees)
        self.stats.num_serial_segments = max((grown.num_levels for grown in run.trees), default=0)
        self.stats.num_prompt_tokens = engine.num_prompt_tokens - num_prompt_tokens
        self.stats.num_cached_tokens = engine.num_cached_tokens - num_cached_tokens
        self.stats.seconds = time.perf_counter() - started
        return [grown.tree for grown in run.trees]

    def _widths(self, widths: Sequence[float] | None, expected_length: int | None) -> Sequence[float] | None:
        if widths is None or self.config.own_widths is None:
            return first_widths(self.config, expected_length)
        return widths

    def check(self, prompts: list[list[int]]) -> None:
        """Raise the `ValueError` that `sample` would raise for these prompts, without sampling."""
        for index, prompt in enumerate(prompts):
            self._max_length(prompt, index)

    def _max_length(self, prompt: list[int], index: int) -> int:
        """Longest completion of a prompt, or an error if there is no room for one."""
        if not prompt:
            raise ValueError(
                f"Prompt {index} of this batch is empty: it has no token to continue. Drop empty prompts, or check "
                "how they are tokenized."
            )
        max_length = completion_cap(self.engine, self.config, prompt)
        if max_length < 1:
            context = self.engine.context_length
            start = f", which starts with {self.decode(prompt[:16])!r}," if self.decode is not None else ""
            raise ValueError(
                f"Prompt {index} of this batch{start} has {len(prompt)} tokens and leaves no room for a completion in "
                f"the engine's context of {context} tokens. Drop or shorten such prompts, or, if the model has a "
                "longer context than its vLLM engine, raise `vllm_max_model_length`."
            )
        return max_length

    # Filling the engine

    def _fill(self, run: _Run) -> None:
        """Submit segments of the oldest trees first, and start trees while slots are free."""
        requests: list[SegmentRequest] = []
        newest = self._newest_that_fits(run)
        longest = max((length for _, _, length in run.in_flight.values()), default=0)
        while (index := self._next_tree(run, newest, longest)) is not None:
            grown = run.trees[index]
            position, prefix, max_tokens = grown.take()
            longest = max(longest, len(prefix) + max_tokens)
            request_id = self.stats.num_segments
            self.stats.num_segments += 1
            requests.append(SegmentRequest(request_id, prefix, max_tokens, tree=index))
            run.in_flight[request_id] = index, position, len(prefix) + max_tokens
            if grown.num_taken == len(grown.level):
                heapq.heappop(run.ready)
        if requests:
            started = time.perf_counter()
            self.engine.submit(requests)
            self.stats.engine_seconds += time.perf_counter() - started

    def _next_tree(self, run: _Run, newest: int, longest: int) -> int | None:
        """Oldest tree with a segment to submit, a newly started one if need be; `None` if there is none or no slot."""
        num_slots = self.engine.num_slots(longest)
        if run.in_flight and num_slots is not None and len(run.in_flight) >= num_slots:
            return None
        if not run.ready:
            if run.num_started > newest:
                return None
            run.current = run.num_started
            run.trees[run.num_started].start()
            run.unfinished.add(run.num_started)
            run.ready.append(run.num_started)
            run.num_started += 1
            run.current = None
        return run.ready[0] if run.ready[0] <= newest else None

    def _newest_that_fits(self, run: _Run) -> int:
        """
        Newest tree that fits into the engine's cache beside all older ones; the oldest one always does.

        Trees that wait for answers alone do not count: their part of the cache may be taken, and computed again.
        """
        capacity = self.engine.num_cache_tokens
        if capacity is None:
            return len(run.trees) - 1
        newest, tokens = -1, 0
        for index in (*sorted(run.unfinished - run.waiting), *range(run.num_started, len(run.trees))):
            tokens += run.trees[index].working_tokens()
            if tokens > capacity and newest >= 0:
                break
            newest = index
        return newest

    # What comes back

    def _collect(self, run: _Run, has_turns: bool) -> list[int]:
        """Wait for segments or answers; returns the trees whose level is complete, in order of their last segment."""
        complete: list[int] = []
        for result in self._results(run, has_turns):
            index, position, _ = run.in_flight.pop(result.request_id)
            run.current = index
            run.trees[index].receive(position, result)
            run.current = None
            if run.trees[index].is_complete:
                complete.append(index)
            elif run.trees[index].has_arrived:
                run.waiting.add(index)
        answered = [index for index in sorted(run.waiting) if run.trees[index].is_complete]
        run.waiting.difference_update(answered)
        return complete + answered

    def _results(self, run: _Run, has_turns: bool) -> list[SegmentResult]:
        """Segments that are done; none where an answer has come first, or where there is nothing to decode."""
        started = time.perf_counter()
        if not run.in_flight:
            futures = [pending.future for index in run.waiting for pending in run.trees[index].pending.values()]
            wait([future for future in futures if not future.done()], return_when=FIRST_COMPLETED)
            self.stats.tool_seconds += time.perf_counter() - started
            return []
        if has_turns:
            results = self.engine.collect(lambda: any(run.trees[index].is_complete for index in run.waiting))
        else:
            results = self.engine.collect()
        self.stats.engine_seconds += time.perf_counter() - started
        return results

    def _advance(
        self,
        run: _Run,
        index: int,
        on_leaves: Callable[[int], None] | None,
        on_tree: Callable[[int, SegmentTree], None] | None,
    ) -> None:
        run.current = index
        grown = run.trees[index]
        num_new_leaves = grown.advance()
        if on_leaves is not None and num_new_leaves:
            on_leaves(num_new_leaves)
        if grown.level:
            heapq.heappush(run.ready, index)
        else:
            run.unfinished.remove(index)
            self.engine.end_tree(index)
            grown.tree.sort_leaves()
            if on_tree is not None:
                on_tree(index, grown.tree)
        run.current = None

    # Errors

    def _abort(self, run: _Run, error: BaseException, turns: TurnHandler | None) -> None:
        """Free the engine, end what answers turns, and add to the error which prompts were being sampled."""
        try:
            self.engine.abort()
        except Exception as abort_error:
            error.add_note(f"Aborting what the engine was running failed too: {abort_error!r}")
        if turns is not None:
            turns.abort()
        if run.current is not None:
            indices = [run.current]
        elif isinstance(error, SegmentEngineError) and error.request_id in run.in_flight:
            indices = [run.in_flight[error.request_id][0]]
        else:
            indices = sorted({index for index, _, _ in run.in_flight.values()} | run.waiting)
        if not indices:
            return
        names = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
        note = f"While sampling prompt{'s' * (len(indices) > 1)} {names} of {len(run.trees)} (the first is 0)"
        prompt = run.trees[indices[0]].tree.prompt_ids
        try:
            text = None if self.decode is None else self.decode(prompt[-64:])
        except Exception:  # the decoder may be what failed
            text = None
        error.add_note(
            f"{note}; prompt {indices[0]} has {len(prompt)} tokens" + (f" and ends in {text!r}" if text else "")
        )
