"""A progress bar with one readable line per logged step."""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class TreeProgressCallback(ProgressCallback):
    """Replaces the dictionaries that [`~transformers.ProgressCallback`] prints by one line of words."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Print the line, where this process shows a bar at all."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "reward" in logs or "eval_reward" in logs:
            self.training_bar.write(step_line(logs, state.global_step, state.max_steps))


@contextmanager
def lines_above_the_bar() -> Iterator[None]:
    """Write what is logged to the terminal, and Python's warnings, above the bar instead of into its line."""
    levels = {logger: level for logger in _loggers() if (level := _console_level(logger)) is not None}
    before, showed = {logger: list(logger.handlers) for logger in levels}, warnings.showwarning
    logging.captureWarnings(True)
    is_captured_here = warnings.showwarning is not showed
    try:
        with logging_redirect_tqdm(list(levels)):
            for logger, level in levels.items():
                for handler in logger.handlers:
                    if handler not in before[logger]:  # tqdm's, which has no level of its own
                        handler.setLevel(level)
            yield
    finally:
        if is_captured_here:
            logging.captureWarnings(False)


def _loggers() -> list[logging.Logger]:
    return [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]


def _console_level(logger: logging.Logger) -> int | None:
    """From which level on a logger writes to the terminal by itself; `None` if it does not."""
    streams = sys.stdout, sys.stderr
    levels = [
        handler.level
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    ]
    if logger is logging.root and not logger.handlers:
        return logging.WARNING  # as `logging.lastResort` has it
    return min(levels, default=None)


def step_line(logs: Mapping[str, float], step: int, max_steps: int) -> str:
    """One step's reward, tokens decoded, tokens that sharing saved, and seconds; or the reward of an evaluation."""
    line = f"step {step:>{len(str(max_steps))}}/{max_steps}  "
    if "reward" not in logs:
        return f"{line}held-out reward {_number(logs['eval_reward'])}"
    line += f"reward {_number(logs['reward'])}"
    if "tree/decoded_tokens" in logs:
        decoded, in_leaves = logs["tree/decoded_tokens"], logs["tree/leaf_tokens"]
        saved = in_leaves - logs["tree/unique_tokens"]
        line += f"  decoded {decoded:.0f} tokens  saved by sharing {saved:.0f} ({saved / in_leaves:.0%})"
    if "step_time" in logs:
        line += f"  {logs['step_time']:.1f} s"
    return line


def _number(value: float | None) -> str:
    """A mean reward, which TRL logs as `None` where no completion was scored."""
    return "none" if value is None else f"{value:.3f}"
