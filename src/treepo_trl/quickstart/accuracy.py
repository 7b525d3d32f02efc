"""Accuracy of a policy on tasks with known answers, through the `evaluate` library."""

from collections.abc import Callable, Sequence
from typing import cast

import datasets
import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo_trl.engines import SamplingOptions, SegmentRequest
from treepo_trl.engines.for_model import engine_for_model


class AnswerAccuracy(evaluate.Metric):
    """
    Fraction of texts whose parsed answer equals the reference. An `evaluate` metric that needs no hub.

    Args:
        parse (`Callable[[str], str]`):
            Finds the answer in a text.
    """

    def __init__(self, parse: Callable[[str], str]) -> None:
        super().__init__()
        self.parse = parse

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of predictions whose parsed answer equals the reference.",
            citation="",
            inputs_description="predictions: texts; references: answers",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        hits = [self.parse(text) == answer for text, answer in zip(predictions, references, strict=True)]
        return {"accuracy": sum(hits) / len(hits)}


def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_tokens: int,
    eos_token_ids: list[int],
) -> list[str]:
    """Text of the most likely next tokens after each conversation, up to EOS or `max_tokens`."""
    encoded = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    ids = cast(dict[str, list[list[int]]], encoded)["input_ids"]
    engine = engine_for_model(model, eos_token_ids, SamplingOptions(temperature=0.0))
    requests = [SegmentRequest(i, list(prompt), max_tokens) for i, prompt in enumerate(ids)]
    was_training = model.training
    model.eval()
    try:
        results = {result.request_id: result.token_ids for result in engine.complete(requests)}
    finally:
        model.train(was_training)
    return [str(tokenizer.decode(results[i], skip_special_tokens=True)) for i in range(len(ids))]
