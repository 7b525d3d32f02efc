"""All checks in their order: packages first, then what stands on them."""

import sys
from collections.abc import Callable

from treepo_trl.memory import NotPlannedError

from .child import kernel_names, training_names
from .environment import environment, installed_as
from .findings import (
    CHANGE_SETTING,
    BrokenError,
    CannotRunError,
    Check,
    Finding,
    Report,
    finding_of,
    in_words,
    last_line,
)
from .needs import Needs
from .processes import run_group
from .versions import check_versions, how_to_install


GIB = 2**30


def examine(
    needs: Needs, memory: Check | None = None, servers: Check | None = None, settings: Check | None = None
) -> Report:
    """
    Environment and findings for what is needed.

    Args:
        needs ([`Needs`]):
            What is to be checked.
        memory (`Callable`, *optional*):
            The check whether a recipe fits the card; see [`check_memory`].
        servers (`Callable`, *optional*):
            The check of the servers that a recipe names; see `servers.py`.
        settings (`Callable`, *optional*):
            The check whether a training takes a recipe's settings; see `settings.py`.
    """
    report = Report(environment())
    report.findings.append(finding_of("versions", lambda: check_versions(needs.packages), ""))
    if settings is not None:
        report.findings.append(finding_of("settings", settings, "Look for this error in the issues of vLLM."))
    if memory is not None:
        report.findings.append(finding_of("memory", memory, "Give `--card_gib`, or name another model."))
    if servers is not None:
        _say("servers")
        report.findings.append(finding_of("servers", servers, "Start them as docs/servers.md says."))
    _say("number type, packed update, 4-bit")
    report.findings += run_group("kernels", kernel_names(needs), needs)
    names = training_names(needs)
    absent = missing_for_engine(needs)
    if absent is not None:
        report.findings += [absent, *(Finding(name, "cannot run", "there is no engine") for name in names[1:])]
        return report
    _say("engine, and what it computes")
    report.findings += run_group("training", names, needs)
    return report


def missing_for_engine(needs: Needs) -> Finding | None:
    """The finding about an engine that lacks a package; `None` if none is missing."""
    for package, is_needed in (("vllm", needs.uses_vllm), ("peft", needs.has_adapter)):
        if is_needed and installed_as(package) is None:
            cause = f"{package} is not installed, and {'samples' if package == 'vllm' else 'makes the adapter'}."
            return Finding("engine", "broken", cause, how_to_install(package))
    return None


def check_memory(plan: Callable[[float], tuple[list[str], float]], card: float | None, free: float | None) -> str:
    """
    Check whether a recipe fits a card.

    Args:
        plan (`Callable`):
            Reasons why it does not fit a card of so many bytes, and the bytes that it takes at most.
        card (`float`, *optional*):
            The card's memory in bytes; `None` without a card.
        free (`float`, *optional*):
            What of it is free; `None` for a card that is not here.
    """
    if card is None:
        raise CannotRunError("this machine has no card; say how large it is (`--card_gib 24`)")
    try:
        problems, taken = plan(card)
    except OSError as error:  # no such model, or no way to the hub
        raise CannotRunError(f"the config of the recipe's model cannot be read: {last_line(str(error))}") from error
    except NotPlannedError as error:
        raise CannotRunError(f"the plan does not count this training, which goes on without: {error}") from error
    except ValueError as error:
        raise BrokenError(in_words(error), CHANGE_SETTING) from error
    except (RuntimeError, AttributeError, LookupError, TypeError) as error:  # of a model that is not built from this
        raise CannotRunError(
            f"the plan does not count this training, which goes on without: {in_words(error)}"
        ) from error
    if problems:
        causes, _, remedies = zip(*(problem.partition(": ") for problem in problems), strict=True)
        raise BrokenError(f"{'. '.join(causes)}.", " ".join(each[:1].upper() + each[1:] for each in remedies))
    if free is not None and taken > free:
        raise BrokenError(
            f"The recipe takes {taken / GIB:.1f} GiB at most, and {free / GIB:.1f} of the card's "
            f"{card / GIB:.1f} are free.",
            "End the other processes on the card (`nvidia-smi` lists them).",
        )
    return f"the recipe takes {taken / GIB:.1f} GiB at most, of {card / GIB:.1f} (planned, not measured)"


def _say(what: str) -> None:
    sys.stderr.write(f"checking {what} ...\n")
