"""Rollouts of the user's own as trees: what a `rollout_func` returns, rows or trees. Standard library only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from treepo_trl.sampling.tree import SegmentTree


ROW_KEYS = ("prompt_ids", "completion_ids", "logprobs")
"""What a `rollout_func` must return in TRL."""

Columns = dict[str, object]


def rows_of_trees(trees: Sequence[SegmentTree], width: int, filler: int) -> Columns:
    """Leaves as the columns that TRL takes from a `rollout_func`; a tree with fewer than `width` has vacant rows."""
    rows = [(tree, leaf) for tree in trees for leaf in [*tree.leaves, *[None] * (width - len(tree.leaves))]]
    has_logprobs = all(node.logprobs is not None for tree in trees for node in tree.nodes if node.is_sampled)
    columns: Columns = {
        "prompt_ids": [tree.prompt_ids for tree, _ in rows],
        "completion_ids": [[filler] if leaf is None else tree.completion_ids(leaf) for tree, leaf in rows],
        "logprobs": [[0.0] if leaf is None else tree.logprobs(leaf) for tree, leaf in rows] if has_logprobs else None,
    }
    if any(not node.is_sampled for tree in trees for node in tree.nodes):
        columns["env_mask"] = [[0] if leaf is None else tree.sampled_mask(leaf) for tree, leaf in rows]
    return columns


def trees_of_rows(columns: Mapping[str, object], group_size: int) -> list[SegmentTree]:
    """
    A tree for each prompt from the columns of a `rollout_func`: its rows are independent, each a path of its own.

    Raises:
        ValueError: if the columns do not hold groups of `group_size` rows with one prompt each.
    """
    prompts = cast("list[list[int]]", columns["prompt_ids"])
    completions = cast("list[list[int]]", columns["completion_ids"])
    logprobs = cast("list[list[float]] | None", columns["logprobs"])
    masks = cast("list[list[int]] | None", columns.get("env_mask"))
    for name, column in (("completion_ids", completions), ("logprobs", logprobs), ("env_mask", masks)):
        if column is not None and len(column) != len(prompts):
            raise ValueError(
                f"`rollout_func` has returned {len(prompts)} `prompt_ids` and {len(column)} `{name}`. Return one of "
                "each per row."
            )
    trees: list[SegmentTree] = []
    for start in range(0, len(prompts), group_size):
        rows = slice(start, start + group_size)
        if any(list(prompt) != list(prompts[start]) for prompt in prompts[rows]):
            raise ValueError(
                f"`rollout_func` has returned different `prompt_ids` for rows {start} to {start + group_size - 1}, "
                "which are completions of one prompt. Return them in the order of the prompts that it is given."
            )
        tree = SegmentTree(list(prompts[start]))
        for row in range(start, min(start + group_size, len(prompts))):
            values, mask = logprobs[row] if logprobs else None, masks[row] if masks else None
            tree.add_path(None, completions[row], values, mask)
        trees.append(tree)
    return trees


class TreeRollout:
    """
    A `rollout_func` that may return trees.

    Args:
        function (`Callable`):
            The user's. From prompts and trainer it makes the columns of TRL's contract, or `trees` and further columns
            with a value per leaf.
        take (`Callable[[list[SegmentTree]], None]`):
            Gets the trees of a training.
    """

    def __init__(
        self, function: Callable[..., Mapping[str, object]], take: Callable[[list[SegmentTree]], None]
    ) -> None:
        self._function, self._take = function, take

    def __call__(self, prompts: list[Any], trainer: Any) -> Columns:
        """The columns that TRL takes."""
        columns = dict(self._function(prompts, trainer))
        is_training = bool(trainer.model.training)
        group_size = cast(int, trainer.num_generations if is_training else trainer.num_generations_eval)
        trees = cast("list[SegmentTree] | None", columns.pop("trees", None))
        if trees is not None:
            may_lack = is_training and trainer.args.fallback_policy == "none"
            _check_trees(trees, len(prompts) // group_size, group_size, 1 if may_lack else group_size)
            own = {name: _per_row(column, trees, group_size) for name, column in columns.items()}
            columns = rows_of_trees(trees, group_size, trainer.eos_token_ids[0]) | own
        elif all(name in columns for name in ROW_KEYS):
            trees = trees_of_rows(columns, group_size)
        else:  # TRL says what is missing
            return columns
        num_rows = len(cast("list[object]", columns["prompt_ids"]))
        if num_rows != len(prompts):
            raise ValueError(
                f"`rollout_func` has returned {num_rows} rows for {len(prompts)} prompts. It is given each prompt "
                f"{group_size} times, and returns a completion for each time."
            )
        if is_training:
            self._take(trees)
        return columns


def _per_row(column: object, trees: Sequence[SegmentTree], width: int) -> object:
    """A column with a value per leaf as one with a value per row; anything else as it is."""
    if not isinstance(column, list) or len(column) != sum(len(tree.leaves) for tree in trees):
        return column
    rest = iter(cast("list[object]", column))
    return [next(rest) if i < len(tree.leaves) else None for tree in trees for i in range(width)]


def _check_trees(trees: Sequence[SegmentTree], num_prompts: int, group_size: int, fewest: int) -> None:
    sizes = [len(tree.leaves) for tree in trees]
    if len(sizes) != num_prompts or not all(fewest <= size <= group_size for size in sizes):
        span = f"{group_size}" if fewest == group_size else f"{fewest} to {group_size}"
        raise ValueError(
            f"`rollout_func` has returned trees of {', '.join(map(str, sizes)) or 'no'} leaves. Return "
            f"{num_prompts} trees, one per different prompt, with {span} leaves each."
        )
