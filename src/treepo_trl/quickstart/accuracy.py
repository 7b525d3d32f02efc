"""Accuracy of a policy on tasks with known answers, through the `evaluate` library."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
from transformers import PreTrainedModel

from treepo_trl.engines import SamplingOptions, SegmentRequest
from treepo_trl.engines.transformers import TransformersEngine


class AnswerAccuracy(evaluate.Metric):
    """
    Fraction of texts whose parsed answer equals the reference. An `evaluate` metric that needs no hub.

    Args:
        parse (`Callable[[str], str]`):
            Finds the answer in a text.
    """

    def __init__(self, parse: Callable[[str], str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
    tokenizer: Any,
    prompts: list[list[dict[str, str]]],
    max_tokens: int,
    eos_token_ids: list[int],
) -> list[str]:
    """Text of the most likely next tokens after each conversation, up to EOS or `max_tokens`."""
    engine = TransformersEngine(model, eos_token_ids, SamplingOptions(temperature=0.0))
    was_training = model.training
    model.eval()
    ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]
    engine.submit([SegmentRequest(i, list(prompt), max_tokens) for i, prompt in enumerate(ids)])
    texts: dict[int, str] = {}
    while len(texts) < len(prompts):
        for result in engine.collect():
            texts[result.request_id] = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    model.train(was_training)
    return [texts[i] for i in range(len(prompts))]
