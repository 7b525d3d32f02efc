"""Scores of sampled completions: by the data's own judge, or by reward functions as in training."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from trl.trainer.utils import is_async_callable

from treepo_trl.evaluation import Judgement, majority_at_k, mean_score, pass_at_k, subtrees_of
from treepo_trl.sampling import SegmentTree, TreeSamplingConfig
from treepo_trl.scoring.reward_watch import checked_rewards

from .data import EvalSet


Judgements = list[Judgement | None]
"""One for each completion; `None` for one that is not scored."""


Texts = Sequence[Sequence[str]]
"""Those of the leaves of each prompt's tree."""
Scorer = Callable[[Sequence[SegmentTree], Texts], Judgements]


def make_scorers(
    reward_funcs: Sequence[str] | None, eval_set: EvalSet, config: TreeSamplingConfig
) -> dict[str, Scorer]:
    """
    What scores completions, by its name in the table: an empty one for the judge of the data.

    Raises:
        ValueError: for a reward function that cannot be loaded, or that needs a column which the data lacks.
    """
    if not reward_funcs:
        assert eval_set.judge is not None, "data without answers is refused"
        return {"": _judged_by(eval_set.judge)}
    from treepo_trl.apps.train.command import reward_function

    scorers: dict[str, Scorer] = {}
    for path in reward_funcs:
        function = reward_function(path, config)
        _check_columns(path, function, eval_set)
        name = path.rpartition(".")[2]
        scorers[path if name in scorers else name] = _rewarded_by(function, name, eval_set)
    return scorers


def _judged_by(judge: Callable[[int, str], Judgement]) -> Scorer:
    def score(_: Sequence[SegmentTree], texts: Texts) -> Judgements:
        return [judge(i, text) for i, own in enumerate(texts) for text in own]

    return score


def _check_columns(path: str, function: Callable[..., object], eval_set: EvalSet) -> None:
    given = {"prompts", "completions", "completion_ids", *eval_set.columns}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty and name not in given
    ]
    if needed:
        raise ValueError(
            f"`--reward_funcs {path}` needs the column {needed[0]!r}, and the data has "
            f"{', '.join(eval_set.columns) or 'none beside the prompts'}. Rename the data's column, or choose another "
            "reward function."
        )


def _rewarded_by(function: Callable[..., Any], name: str, eval_set: EvalSet) -> Scorer:
    def score(trees: Sequence[SegmentTree], texts: Texts) -> Judgements:
        rows = [(i, text) for i, own in enumerate(texts) for text in own]
        are_messages = [not isinstance(eval_set.prompts[i], str) for i, _ in rows]
        completions = [
            [{"role": "assistant", "content": text}] if is_messages else text
            for (_, text), is_messages in zip(rows, are_messages, strict=True)
        ]
        returned = function(
            prompts=[eval_set.prompts[i] for i, _ in rows],
            completions=completions,
            completion_ids=[tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves],
            **{column: [values[i] for i, _ in rows] for column, values in eval_set.columns.items()},
        )
        if is_async_callable(function):
            returned = asyncio.run(returned)
        rewards = checked_rewards(returned, name, len(rows))
        answers = [None if eval_set.answer_of is None else eval_set.answer_of(text) for _, text in rows]
        return [
            None if reward is None or reward != reward else Judgement(reward, answer)
            for reward, answer in zip(rewards, answers, strict=True)
        ]

    return score


def prompt_values(
    trees: Sequence[SegmentTree],
    texts: Texts,
    scorers: Mapping[str, Scorer],
    ks: Sequence[int],
    num_samples: int,
    with_majority: bool,
) -> list[dict[str, float] | None]:
    """
    What is averaged over prompts, for each prompt; `None` for one with a completion that is not scored.

    Args:
        trees (sequence of [`SegmentTree`]), texts (sequence of sequences of `str`):
            Of one column.
        scorers (mapping of `str` to scorers):
            By their names in the table.
        ks (sequence of `int`):
            Those of pass@k and maj@k.
        num_samples (`int`):
            Completions of a prompt: the k of mean@k.
        with_majority (`bool`):
            Whether the answers are known that maj@k counts.
    """
    values: list[dict[str, float] | None] = [{} for _ in trees]
    for name, scorer in scorers.items():
        judgements = iter(scorer(trees, texts))
        prefix = f"{name} " if name else ""
        for i, tree in enumerate(trees):
            own = [next(judgements) for _ in tree.leaves]
            so_far = values[i]
            if so_far is None or any(judgement is None for judgement in own):
                values[i] = None
                continue
            subtrees = subtrees_of(tree, cast("list[Judgement]", own))
            so_far[f"{prefix}mean@{num_samples}"] = mean_score(subtrees)
            so_far |= {f"{prefix}pass@{k}": pass_at_k(subtrees, k) for k in ks}
            if with_majority:
                so_far |= {f"{prefix}maj@{k}": majority_at_k(subtrees, k, f"{i}") for k in ks if k > 1}
            values[i] = so_far
    for tree, of_prompt in zip(trees, values, strict=True):
        if of_prompt is not None:
            weighted = list(zip(tree.leaves, tree.leaf_weights(), strict=True))
            of_prompt["tokens"] = tree.mean_length()
            of_prompt["cut off"] = sum(w for leaf, w in weighted if tree.nodes[leaf].finish_reason == "length")
    return values
