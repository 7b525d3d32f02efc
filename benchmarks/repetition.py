"""
Errors and cost of the repetition rule, next to the rule of the paper's released code.

    python -m benchmarks.repetition

Reads the labelled strings of the tests. Both rules look at a text every 16 characters. A string without a loop is a
false positive if a rule fires anywhere in it. A string with a loop is missed if the rule fires nowhere. Prints
Markdown tables.
"""

import json
import random
import statistics
import string
import timeit
from collections import Counter
from collections.abc import Callable

from benchmarks.common import ROOT, make_parser, table_head, table_row
from treepo_trl.sampling.stopping import MIN_REPEATED_CHARACTERS, MIN_REPEATS, is_repetitive


SEGMENT_CHARACTERS = 1800
"""Roughly the 512 tokens of a segment in the paper."""
LABELLED = ROOT / "tests/data/repetition.jsonl"


def released_rule(text: str) -> bool:
    """Whether any 32 characters occur at least 8 times, overlaps included, in the last segment of a text."""
    segment = text[(len(text) - 1) // SEGMENT_CHARACTERS * SEGMENT_CHARACTERS :]
    counts = Counter(segment[i : i + 32] for i in range(len(segment) - 31))
    return max(counts.values(), default=0) >= 8


RULES: dict[str, Callable[[str], bool]] = {"treepo-trl": is_repetitive, "released code": released_rule}


def first_detection(rule: Callable[[str], bool], text: str) -> int | None:
    """Characters after which a rule fires, in steps of 16; `None` if it never does."""
    return next((end for end in [*range(16, len(text), 16), len(text)] if rule(text[:end])), None)


def loop_start(text: str) -> int | None:
    """Where the loop at the end of a text begins; `None` if nothing there repeats exactly."""
    for period in range(1, len(text) // MIN_REPEATS + 1):
        start = len(text)
        while start > period and text[start - 1] == text[start - 1 - period]:
            start -= 1
        if len(text) - start + period >= max(MIN_REPEATED_CHARACTERS, MIN_REPEATS * period):
            return start - period
    return None


def print_errors() -> None:
    """Both rules' errors, in total and by kind of string, and how far into the loop they fire."""
    with LABELLED.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    kinds = sorted({(row["is_loop"], row["kind"]) for row in rows})
    wrong = {name: Counter[tuple[bool, str]]() for name in RULES}
    false_positives = {name: list[str]() for name in RULES}
    delays = {name: list[int]() for name in RULES}
    for row in rows:
        start = loop_start(row["text"]) if row["is_loop"] else None
        for name, rule in RULES.items():
            detection = first_detection(rule, row["text"])
            wrong[name][row["is_loop"], row["kind"]] += (detection is None) == row["is_loop"]
            if detection is not None and not row["is_loop"]:
                false_positives[name].append(row["name"])
            if detection is not None and start is not None:
                delays[name].append(max(detection - start, 0))
    negatives = sum(not row["is_loop"] for row in rows)
    print(table_head("rule", "false positives", "missed loops", "characters into the loop, median", "largest"))
    for name in RULES:
        false, missed = (sum(n for (loop, _), n in wrong[name].items() if loop is label) for label in (False, True))
        shares = [
            f"{errors} of {count} ({errors / count:.1%})"
            for errors, count in ((false, negatives), (missed, len(rows) - negatives))
        ]
        print(table_row(name, *shares, f"{statistics.median(delays[name]):.0f}", max(delays[name])))
    print(f"\nFalse positives of treepo-trl: {', '.join(false_positives['treepo-trl'])}.")
    print()
    print(table_head("label", "kind", "strings", *(f"wrong, {name}" for name in RULES)))
    for is_loop, kind in kinds:
        count = sum((row["is_loop"], row["kind"]) == (is_loop, kind) for row in rows)
        print(
            table_row("loop" if is_loop else "no loop", kind, count, *(wrong[name][is_loop, kind] for name in RULES))
        )


def shortest_seconds(call: Callable[[], object]) -> float:
    """Shortest time of one call."""
    return min(timeit.repeat(call, number=1, repeat=50))


def print_times(num_characters: int) -> None:
    """Time of one call on a whole text; the released rule looks at each of its segments once."""
    rng = random.Random(0)
    ordinary = "".join(rng.choice(string.ascii_lowercase + "   ") for _ in range(num_characters))
    texts = {
        "ordinary": ordinary,
        "loop of 260 characters": (ordinary[:260] * num_characters)[:num_characters],
        "nearly periodic": "a" * (num_characters - 500) + "b" + "a" * 499,
        "rules between numbers": "".join(["-" * 40 + f"{i}\n" for i in range(num_characters)])[: num_characters - 40]
        + "-" * 40,
    }
    print()
    print(table_head(f"{num_characters} characters", "us, treepo-trl", "us, released code"))
    for name, text in texts.items():
        ends = [*range(SEGMENT_CHARACTERS, len(text), SEGMENT_CHARACTERS), len(text)]
        ours = shortest_seconds(lambda text=text: is_repetitive(text))
        released = shortest_seconds(lambda text=text, ends=ends: [released_rule(text[:end]) for end in ends])
        print(table_row(name, f"{1e6 * ours:.0f}", f"{1e6 * released:.0f}"))


def main() -> None:
    """Print errors and times."""
    parser = make_parser(__doc__)
    parser.add_argument("--num_characters", type=int, default=30_000, help="length of the texts that are timed")
    args = parser.parse_args()
    print_errors()
    print_times(args.num_characters)


if __name__ == "__main__":
    main()
