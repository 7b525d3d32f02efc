"""The metric on tasks with known answers."""

from treepo_trl.quickstart import AnswerAccuracy, last_number


def test_accuracy_counts_parsed_answers() -> None:
    metric = AnswerAccuracy(last_number)
    result = metric.compute(predictions=["is 3", "4", "none", "5 6"], references=["3", "4", "5", "5"])
    assert result == {"accuracy": 0.5}  # the first two of four
