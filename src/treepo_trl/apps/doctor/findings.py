"""What a check has found, and all findings as a report: text for people, JSON for an issue, an exit status."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal


Status = Literal["ok", "broken", "cannot run"]
Check = Callable[[], str]
"""Says what was seen. Raises [`BrokenError`], [`CannotRunError`], or whatever the library under it raises."""

CHANGE_SETTING = "Change the setting that it names."
"""What to do about an error that names a setting and what it may be."""
_LONGEST_LINE = 400  # characters of an error of a library


class BrokenError(Exception):
    """What was checked does not work: what is wrong in a sentence, and what to set or to install."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.remedy = remedy


class CannotRunError(Exception):
    """This machine cannot show it; the message says why."""


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        check (`str`):
            Name of the check.
        status (`str`):
            `"ok"`, `"broken"`, or `"cannot run"`, which is neither.
        detail (`str`):
            What was seen, the cause, or why the check cannot run.
        remedy (`str`, *optional*):
            What to do about something broken.
        seconds (`float`):
            Wall time of the check.
    """

    check: str
    status: Status
    detail: str
    remedy: str | None = None
    seconds: float = 0.0


def finding_of(name: str, check: Check, remedy: str) -> Finding:
    """Run one check. Whatever it raises becomes its finding; `remedy` is for an error that the check does not know."""
    started = time.perf_counter()
    status: Status = "ok"
    advice = None
    try:
        detail = check()
    except CannotRunError as error:
        status, detail = "cannot run", str(error)
    except BrokenError as error:
        status, detail, advice = "broken", str(error), error.remedy
    except Exception as error:  # of torch, vLLM or bitsandbytes: their own words are the cause
        status, detail, advice = "broken", in_words(error), remedy
    return Finding(name, status, detail, advice, round(time.perf_counter() - started, 1))


def in_words(error: Exception) -> str:
    """The kind of an error, and its last line; of CUDA's the first, which stands before advice for developers."""
    text = str(error)
    first = text.partition("\n")[0]
    return f"{type(error).__name__}: {last_line(first if 'CUDA error' in first else text)}"


def last_line(text: str) -> str:
    """The last line of a text that says anything, cut to a length for reading."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_LONGEST_LINE] if lines else "no message"


@dataclass
class Report:
    """Rows of the environment, and findings in the order of their checks."""

    environment: Mapping[str, str]
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def exit_status(self) -> int:
        """0 if nothing is broken, else 1. A check that cannot run breaks nothing."""
        return int(any(finding.status == "broken" for finding in self.findings))

    def to_dict(self) -> dict[str, object]:
        """All of it in types of JSON."""
        checks = [asdict(finding) for finding in self.findings]
        return {"environment": dict(self.environment), "checks": checks, "exit_status": self.exit_status}

    def text(self) -> str:
        """Environment, findings and verdict, a line each; below something broken its remedy."""
        width = max(map(len, [*self.environment, *(finding.check for finding in self.findings)]))
        lines = [f"{name:{width}}  {value}" for name, value in self.environment.items()]
        lines.append("")
        for finding in self.findings:
            lines.append(f"{finding.check:{width}}  {finding.status}: {finding.detail}")
            if finding.remedy is not None:
                lines.append(f"{'':{width}}  -> {finding.remedy}")
        broken, unknown = (
            ", ".join(finding.check for finding in self.findings if finding.status == status)
            for status in ("broken", "cannot run")
        )
        verdict = f"Broken: {broken}." if broken else "Nothing is broken."
        return "\n".join([*lines, "", f"{verdict} Not shown here: {unknown}." if unknown else verdict])
