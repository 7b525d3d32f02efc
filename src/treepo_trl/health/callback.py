"""The rules while a training runs."""

import logging

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .examination import Examination


logger = logging.getLogger(__name__)


class HealthCallback(TrainerCallback):
    """
    Warns in one line of each illness that the logged metrics show: docs/health.md lists them.

    Each is told once. The first process reads the logs that the training has written anyway; nothing else is computed,
    and the training is not changed. [`TreePOTrainer`] has this callback, and
    `trainer.remove_callback(HealthCallback)` ends it.
    """

    def __init__(self) -> None:
        self._examination, self._num_read = Examination(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start anew. What a resumed training has logged before was told then."""
        self._examination, self._num_read = Examination(), 0
        self._read(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Read the logs that have come since."""
        for line in self._read(state):
            logger.warning(f"Health, {line}")

    def _read(self, state: TrainerState) -> list[str]:
        if not state.is_world_process_zero:
            return []
        new, self._num_read = state.log_history[self._num_read :], len(state.log_history)
        return [str(finding) for log in new for finding in self._examination.add(log)]
