"""`docs/performance.md`: where figures stand, a command, a machine and versions stand too."""

import re
from dataclasses import dataclass

import pytest

from tests.support.paths import ROOT


LIBRARIES = {"torch", "transformers", "TRL", "PEFT", "vLLM"}
MACHINE_NOT_KNOWN = {
    "Memory": "one run whose machine was not noted; the page says so, and the figures are sizes",
}
"""Parts with figures and without a machine, and why they stay."""

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\bpython -m benchmarks\.\w+|^treepo-trl \w+", re.MULTILINE)
_MACHINE = re.compile(r"\b(AMD|Intel|NVIDIA) \w+")
_VERSION = re.compile(r"\b([A-Za-z]+) \d+\.\d+\.\d+\b")
_TABLE = re.compile(r"^\|(?! setting \|).*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """What stands between two headings."""

    title: str
    text: str
    above: str
    """The text of the section from its heading to the first one below it; empty where this is that text."""

    @property
    def has_figures(self) -> bool:
        return any(re.search(r"\d", rows) for rows in _TABLE.findall(self.text))

    @property
    def has_command(self) -> bool:
        return any(_COMMAND.search(block) for block in _BLOCK.findall(self.text))

    @property
    def has_machine(self) -> bool:
        """A part that says that its machine is not known does not take that of its section."""
        where = self.text if "Hardware: not written down" in self.text else self.text + self.above
        return _MACHINE.search(where) is not None

    @property
    def says_versions(self) -> bool:
        """Whether its own versions, if it has a line of them, are numbers or said to be not known."""
        lines = re.findall(r"\bVersions: ([^\n]+(?:\n[^|\n][^\n]*)*)", self.text)
        return all(re.search(r"\d\.\d|not written down", line) for line in lines)


def read(page: str) -> tuple[str, list[Part]]:
    """What stands above the first section, and the parts of a page."""
    head, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    parts = []
    for section in sections:
        first, *others = re.split(r"^### ", section, flags=re.MULTILINE)
        for text, above in [(first, ""), *((text, first) for text in others)]:
            parts.append(Part(text.partition("\n")[0], text, above))
    return head, parts


def versions_of(text: str) -> set[str]:
    return set(_VERSION.findall(text)) & LIBRARIES


HEAD, PARTS = read((ROOT / "docs/performance.md").read_text(encoding="utf-8"))
WITH_FIGURES = [pytest.param(part, id=part.title) for part in PARTS if part.has_figures]


def test_the_page_has_versions_of_its_own() -> None:
    assert versions_of(HEAD) == LIBRARIES


@pytest.mark.parametrize("part", WITH_FIGURES)
def test_figures_have_a_command_and_versions(part: Part) -> None:
    assert part.has_command
    assert part.says_versions
    assert versions_of(HEAD) | versions_of(part.text + part.above) == LIBRARIES


def test_figures_have_a_machine() -> None:
    assert len(WITH_FIGURES) > 15
    assert len(MACHINE_NOT_KNOWN) <= 1
    assert {part.title for part in PARTS if part.has_figures and not part.has_machine} == set(MACHINE_NOT_KNOWN)
    assert {part.title for part in PARTS if "Hardware: not written down" in part.text} == set(MACHINE_NOT_KNOWN)


FIGURES = "| way | s |\n|---|---|\n| trees | 1.5 |\n"
COMMAND = "```sh\npython -m benchmarks.rollout\n```\n"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (f"{COMMAND}2 cores of an AMD EPYC\n{FIGURES}", []),
        (f"{COMMAND}{FIGURES}", ["machine"]),
        (f"`python -m benchmarks.rollout`, 2 cores of an Intel Xeon\n{FIGURES}", ["command"]),
        (f"### Part\n{COMMAND}{FIGURES}", ["machine"]),
        (f"2 cores of an AMD EPYC\n### Part\n{COMMAND}{FIGURES}", []),
        (f"2 cores of an AMD EPYC\n### Part\n{COMMAND}Hardware: not written down.\n{FIGURES}", ["machine"]),
        (f"2 cores of an AMD EPYC\n{COMMAND}### Part\n{FIGURES}", ["command"]),
        (f"{COMMAND}2 cores of an AMD EPYC\nVersions: as above.\n{FIGURES}", ["versions"]),
        ("| setting | value |\n|---|---|\n| leaves | 16 |\n", ["figures"]),
    ],
)
def test_what_a_part_lacks_is_found(text: str, missing: list[str]) -> None:
    part = read(f"# Page\n## Section\n{text}")[1][-1]
    has = {
        "figures": part.has_figures,
        "command": part.has_command,
        "machine": part.has_machine,
        "versions": part.says_versions,
    }
    wanted = has if part.has_figures else {"figures": False}
    assert [name for name, is_there in wanted.items() if not is_there] == missing
