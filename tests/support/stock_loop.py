"""TRL's own loop over tools, given the turns of trees: what it makes of the same script."""

import asyncio
import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from treepo_trl import SegmentTree
from treepo_trl.turns.conversations import first_turn


class StockRows(NamedTuple):
    masks: list[list[int]]
    completions: list[list[dict[str, Any]]]
    completion_ids: list[list[int]]
    num_calls: int
    num_failures: int


def stock_rows(stock: GRPOTrainer, trees: list[SegmentTree], prompts: list[Any], tools: dict[str, Any]) -> StockRows:
    """
    What `GRPOTrainer._tool_call_loop` gives for the leaves of trees, when the model's turns are theirs.

    Args:
        stock: A trainer with the same tools and settings.
        trees: Trees whose prompts are conversations.
        prompts: Conversation of each row.
        tools: Tools by name, synchronous and not.
    """
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    prompt_ids = [tree.prompt_ids for tree, _ in leaves]
    turns = [_turns(tree, leaf) for tree, leaf in leaves]
    firsts = [first_turn(tree, leaf)[0] for tree, leaf in leaves]
    asked = [1] * len(leaves)

    def next_turn(continued: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        given, start = [], 0
        for prefix in continued:  # rows in their order, some left out
            row = next(i for i in range(start, len(leaves)) if _continues(leaves[i], prefix, turns[i], asked[i]))
            given.append(turns[row][asked[row]])
            asked[row] += 1
            start = row + 1
        return given, None

    stock._generate_single_turn = next_turn
    # All of them synchronous: stock would put the answers of asynchronous ones behind the others.
    stock._sync_tool_dicts = [{name: _synchronous(tool) for name, tool in tools.items()}] * len(leaves)
    stock._async_tool_dicts = [{}] * len(leaves)
    completions = [
        [parse_response(stock._tokenizer, first, prefix=ids, tools=stock.tools)]
        for first, ids in zip(firsts, prompt_ids, strict=True)
    ]
    masks, messages, ids, _, calls, failures, _ = stock._tool_call_loop(
        copy.deepcopy(prompts), prompt_ids, firsts, completions, None, None, {}
    )
    return StockRows(masks, messages, ids, calls, failures)


def _synchronous(tool: Callable[..., Any]) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(tool):
        return tool
    return lambda **arguments: asyncio.run(tool(**arguments))


def _turns(tree: SegmentTree, leaf: int) -> list[list[int]]:
    """The sampled tokens of each turn of a path."""
    turns: list[list[int]] = [[]]
    for node in tree.path(leaf):
        if tree.nodes[node].is_sampled:
            turns[-1] += tree.nodes[node].token_ids
        else:
            turns.append([])
    return turns


def _continues(row: tuple[SegmentTree, int], prefix: list[int], turns: list[list[int]], asked: int) -> bool:
    """Whether a row has a turn left behind this prefix."""
    tree, leaf = row
    sequence = tree.sequence_ids(leaf)
    return asked < len(turns) and sequence[: len(prefix)] == prefix and len(sequence) > len(prefix)
