"""pass@k and maj@k of the samples that GRPOTrainer takes in an evaluation, beside its means."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import cast

import torch
from accelerate.utils import gather_object

from treepo_trl.evaluation.answers import Judgement, math_answer, math_verify_is_available
from treepo_trl.evaluation.estimators import Draw, Subtree, default_ks, majority_at_k, pass_at_k
from treepo_trl.trl.host import Host


_ANSWER_COLUMNS = "solution", "answer"


class EvaluationMetrics:
    """
    Logs pass@k and maj@k for k of 1, 2, 4 and so on, up to the samples of a prompt.

    Only for reward functions whose rewards are between 0 and 1: a reward of 1 is right. maj@k also needs the answers
    of completions, which math-verify reads: only with a column `solution` or `answer` that it can read too.

    Args:
        host ([`Host`]):
            Scores and logs.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    def logging(self, calculate_rewards: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`calculate_rewards` whose result is also logged as pass@k and maj@k."""

        def calculate(inputs: list[dict[str, object]], prompts: object, completions: list[object], *more: object):
            rewards = calculate_rewards(inputs, prompts, completions, *more)
            names = self._host.trainer.reward_func_names
            metrics = group_metrics(
                dict(zip(names, cast("list[list[float]]", rewards.T.tolist()), strict=True)),
                self._gathered_answers(inputs, completions),
                self._host.num_generations_eval,
            )
            self._host.log(metrics, "eval")
            return rewards

        return calculate

    def _gathered_answers(self, inputs: list[dict[str, object]], completions: list[object]) -> list[str | None] | None:
        """Answers of all processes' completions, in the order of the rewards; `None` if they cannot be told."""
        if self._host.num_generations_eval < 2:
            return None  # no vote
        own = answers_of(inputs, completions)
        gathered = cast("list[tuple[bool, str | None]]", gather_object(own))
        return [answer for _, answer in gathered] if all(is_known for is_known, _ in gathered) else None


def answers_of(inputs: list[dict[str, object]], completions: list[object]) -> list[tuple[bool, str | None]]:
    """For each row whether its gold answer can be read, so that answers can be told, and the completion's answer."""
    columns = [column for column in _ANSWER_COLUMNS if inputs and column in inputs[0]]
    if not columns or not math_verify_is_available():
        return [(False, None)] * len(completions)
    can_be_told = all(math_answer(str(row[columns[0]])) is not None for row in inputs)
    return [(can_be_told, math_answer(_text(completion)) if can_be_told else None) for completion in completions]


def _text(completion: object) -> str:
    """What a completion says, of messages the last one."""
    if isinstance(completion, str):
        return completion
    messages = cast("list[dict[str, object]]", completion)
    return str(messages[-1].get("content") or "") if messages else ""


def group_metrics(
    rewards: dict[str, list[float]], answers: Sequence[str | None] | None, num_generations: int
) -> dict[str, float]:
    """
    Means over the prompts of a batch.

    Args:
        rewards (`dict[str, list[float]]`):
            For each reward function a reward per completion, those of a prompt together; `nan` for an unscored one.
        answers (sequence of `str` or `None`, *optional*):
            Of the completions; `None` if they cannot be told.
        num_generations (`int`):
            Completions of a prompt.

    Returns:
        `pass@k` and `maj@k`, with several reward functions below `rewards/NAME/`. Nothing of a function with a reward
        outside of 0 and 1, and nothing of a prompt with an unscored completion.
    """
    metrics: dict[str, float] = {}
    for function, values in rewards.items():
        if any(not 0.0 <= value <= 1.0 for value in values if not math.isnan(value)):
            continue
        prefix = f"rewards/{function}/" if len(rewards) > 1 else ""
        own_answers = [None] * len(values) if answers is None else answers
        rows: list[Subtree] = [
            [Draw(1.0, Judgement(value, answer))] for value, answer in zip(values, own_answers, strict=True)
        ]
        groups = [
            rows[i : i + num_generations]
            for i in range(0, len(rows), num_generations)
            if not any(math.isnan(value) for value in values[i : i + num_generations])
        ]
        if not groups:
            continue
        for k in default_ks(num_generations):
            metrics[f"{prefix}pass@{k}"] = fmean(pass_at_k(group, k) for group in groups)
            if answers is not None and k > 1:
                metrics[f"{prefix}maj@{k}"] = fmean(majority_at_k(group, k, i) for i, group in enumerate(groups))
    return metrics
