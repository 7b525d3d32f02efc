"""What a completion says, and whether that is right: the answer of a text by math-verify, and its comparison."""

import threading
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any


_PARSING_SECONDS, _COMPARING_SECONDS = 5, 5


@dataclass(frozen=True, slots=True)
class Judgement:
    """Score and answer of one completion."""

    score: float
    """What the scorer gave, 1 for a right answer."""
    answer: str | None = None
    """Its answer, equal for equal ones; `None` if there is none to be found."""

    @property
    def is_right(self) -> bool:
        """Whether it counts for pass@k and maj@k: a score of at least 1."""
        return self.score >= 1.0


def math_verify_is_available() -> bool:
    """Whether answers can be read and compared."""
    return find_spec("math_verify") is not None


def judge_math(text: str, gold: str) -> Judgement:
    """The mathematical answer of a text, in LaTeX or as a plain number, and whether it equals a gold answer."""
    from math_verify import verify

    parsed = _parse(text)
    if not parsed:
        return Judgement(0.0)
    is_right = verify(_parse(gold), parsed, timeout_seconds=_limit(_COMPARING_SECONDS))
    return Judgement(float(is_right), str(parsed[0]))


def math_answer(text: str) -> str | None:
    """The mathematical answer of a text; `None` if there is none."""
    parsed = _parse(text)
    return str(parsed[0]) if parsed else None


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=targets, parsing_timeout=_limit(_PARSING_SECONDS))


def _limit(seconds: int) -> int:
    """Seconds for one call of math-verify, 0 for no limit: it uses a signal, and the main thread alone gets those."""
    return seconds if threading.current_thread() is threading.main_thread() else 0
