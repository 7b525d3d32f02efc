"""The trees of a generation batch, or those to come, and the rows that `GRPOTrainer`, which knows no trees, takes."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator

from treepo_trl.metrics import add_totals, tree_totals
from treepo_trl.sampling import SamplingStats, SegmentTree
from treepo_trl.turns.conversations import first_turn


Value = TypeVar("Value")
Sampled = tuple[list[SegmentTree], dict[str, float]]
"""Trees of this process, and what they have cost."""


@dataclass(eq=False)  # each is itself alone
class TreeBatch:
    """
    Trees of one process and rewards of all processes.

    Rows are the leaves of the trees, depth-first, tree after tree: B of them on this process. `GRPOTrainer` takes
    equally many for each prompt, so a tree with fewer leaves is followed by vacant rows. They hold one token that no
    sum or mean counts.
    """

    step: int
    """Global step before which the batch was sampled."""
    width: int
    """Rows of each tree: `num_generations`."""
    filler: int = 0
    """The token of a vacant row: one that ends a completion, so that none counts as cut off."""
    number: int = 0
    """How many samplings came before it at the same step."""
    trees: list[SegmentTree] = field(default_factory=list)
    """A tree for each prompt of this process."""
    rewards_per_func: torch.Tensor | None = None
    """`(rows of all processes, num_reward_funcs)`: rewards of the reward functions; `nan` where one does not apply."""
    totals: list[dict[str, float]] = field(default_factory=list)
    """What each sampling for this batch has cost, from `metrics.tree_totals`."""
    is_open: bool = False
    """Whether `GRPOTrainer` is at work on the batch."""
    num_sampled: int = 0
    """How often trees were sampled for rows: once, or more often if a subclass asks again."""

    def next(self, step: int) -> "TreeBatch":
        """The empty batch that comes after this one, sampled at a global step."""
        number = self.number + max(self.num_sampled, 1) if step == self.step else 0
        return TreeBatch(step, self.width, self.filler, number)

    @property
    def name(self) -> str:
        """What tells the next sampling for rows from all others of the training: seeds are made of it."""
        return f"{self.step}/{self.number + self.num_sampled}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Context in which `GRPOTrainer` works on the batch."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def adopt(self, trees: list[SegmentTree]) -> None:
        """Take trees that something else has sampled."""
        self.trees = trees
        self.num_sampled += 1
        self.totals.append(tree_totals(trees, SamplingStats(sum(tree.num_unique_tokens for tree in trees))))

    def rows(self) -> Iterator[tuple[SegmentTree, int | None]]:
        """Tree and leaf of each row; a vacant row has no leaf."""
        for tree in self.trees:
            for i in range(self.width):
                yield tree, tree.leaves[i] if i < len(tree.leaves) else None

    @property
    def is_vacant(self) -> list[bool]:
        """Whether a row is vacant, for each row."""
        return [leaf is None for _, leaf in self.rows()]

    def by_tree(self, values: Sequence[Value]) -> list[list[Value]]:
        """Values of the rows as those of the leaves of each tree."""
        return [list(values[i * self.width :][: len(tree.leaves)]) for i, tree in enumerate(self.trees)]

    def without_missing(self, rewards: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """Rewards of all processes' rows, `nan` for vacant ones and for leaves that have lost their environment."""
        own = [leaf is None or tree.nodes[leaf].finish_reason == "timeout" for tree, leaf in self.rows()]
        missing = cast(torch.Tensor, accelerator.gather(torch.tensor(own, device=accelerator.device)))
        return rewards.masked_fill(missing[:, None].to(rewards.device), torch.nan)

    def first_turns(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of the first turn of each row, which TRL reads as one message."""
        vacant = [self.filler], [0.0]
        turns = [vacant if leaf is None else first_turn(tree, leaf) for tree, leaf in self.rows()]
        return [token_ids for token_ids, _ in turns], [logprobs for _, logprobs in turns]

    def completion_ids(self) -> list[list[int]]:
        """Completion tokens of each row."""
        return [[self.filler] if leaf is None else tree.completion_ids(leaf) for tree, leaf in self.rows()]

    def logprobs(self) -> list[list[float]]:
        """The engine's log-probability of each completion token of each row."""
        return [[0.0] if leaf is None else tree.logprobs(leaf) for tree, leaf in self.rows()]

    def summed_totals(self) -> dict[str, float]:
        """What all samplings have cost, and the unique tokens of the trees that the batch has kept."""
        return add_totals(self.totals) | {"kept_tokens": sum(tree.num_unique_tokens for tree in self.trees)}


class SamplingUnderWay:
    """
    A sampling in a thread.

    Args:
        name (`str`):
            Of the batch.
        prompts (`list[list[int]]`):
            Token ids of this process's prompts.
        future (`Future`):
            Result of the thread.
        share (`Callable[[Callable], tuple[list[SegmentTree], dict[str, float]]]`):
            What this process makes of it. All processes call it together.
        ready (`ExitStack`):
            Closed when the engine is needed no more.
    """

    def __init__(
        self,
        name: str,
        prompts: list[list[int]],
        future: "Future[Any]",
        share: Callable[[Callable[[], Any]], Sampled],
        ready: ExitStack,
    ) -> None:
        self.name, self.prompts = name, prompts
        self._future, self._share, self._ready = future, share, ready
        self._result: Sampled | None = None

    def result(self) -> Sampled:
        """
        Wait for the trees. All processes call it together; an error of the thread is raised here, with its trace.
        """
        if self._result is None:
            with self._ready:
                self._result = self._share(self._future.result)
        return self._result

    def error(self) -> Exception | None:
        """Wait for the trees, and what `result` raises, if anything. All processes call it together."""
        try:
            self.result()
        except Exception as error:
            return error
        return None

    def discard(self) -> None:
        """Wait until the engine is free, for this process alone and whatever the outcome."""
        with self._ready:
            self._future.exception()

    # In checkpoints

    def write(self, path: Path) -> None:
        """Wait for the trees and write them; see `result`."""
        trees, totals = self.result()
        record = {"name": self.name, "prompts": self.prompts, "totals": totals, "trees": [t.to_dict() for t in trees]}
        path.write_text(json.dumps(record))

    @classmethod
    def read(cls, path: Path) -> "SamplingUnderWay":
        """
        What `write` has written.

        Raises:
            OSError, ValueError, KeyError or TypeError: if it is not that.
        """
        record = json.loads(path.read_text())
        if record["totals"].keys() != tree_totals([], SamplingStats()).keys():
            raise ValueError("it counts other things than this version does")
        done: Future[Sampled] = Future()
        done.set_result(([SegmentTree.from_dict(tree) for tree in record["trees"]], record["totals"]))
        return cls(record["name"], record["prompts"], done, lambda result: result(), ExitStack())


def prompts_of_trees(prompt_ids: list[list[int]], num_generations: int) -> list[list[int]]:
    """
    The prompt of each tree, from those of its rows.

    Raises:
        RuntimeError: if the rows of a tree have different prompts.
    """
    prompts = prompt_ids[::num_generations]
    if any(ids != prompts[i // num_generations] for i, ids in enumerate(prompt_ids)):
        raise RuntimeError("A group of `num_generations` rows holds different prompts: a tree has only one.")
    return prompts


def shuffle_trees(batch: dict[str, object], num_generations: int) -> dict[str, object]:
    """
    The rows of a generation batch with its trees in random order.

    Stands in for TRL's `shuffle_sequence_dict`, which shuffles rows. Those of a tree stay together, depth-first.

    Args:
        batch (`dict[str, object]`):
            Tensors and lists with a value per row in their first dimension, numbers, and `None`.
        num_generations (`int`):
            Rows per tree.
    """
    num_trees = len(cast(torch.Tensor, batch["completion_ids"])) // num_generations
    order = torch.randperm(num_trees)[:, None] * num_generations + torch.arange(num_generations)
    rows = order.flatten()

    def permute(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value if value.ndim == 0 else value[rows.to(value.device)]
        return value if value is None else [cast("list[object]", value)[i] for i in rows]

    return {key: permute(value) for key, value in batch.items()}
