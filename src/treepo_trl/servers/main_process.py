"""What one process does for all: its result goes to the others, and so does its error."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def from_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """
    The result of a function that runs in the main process alone. All processes call it together.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes.
        work (`Callable`):
            What is to be done. Its result must be picklable.

    Raises:
        RuntimeError: in the other processes, if it fails. The main process raises the error itself. Without that, the
            others would wait for it until the time limit of their group.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[object] = [None, None]  # result, error in words
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            failed, outcome[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome, from_process=0)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise RuntimeError(f"The main process has failed. {outcome[1]}")
    return outcome[0]  # pyright: ignore[reportReturnType] - what `work` has returned there
