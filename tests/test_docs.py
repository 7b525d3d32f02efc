"""The documentation: generated files are fresh, links lead somewhere, examples give what they say."""

import doctest
import importlib
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT


NAMES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "examples/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]

_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("page", "generator", "function"),
    [
        ("settings.md", "make_settings.py", "settings_page"),
        ("models.md", "make_models.py", "models_page"),
        ("health.md", "make_health.py", "health_page"),
    ],
)
def test_generated_file_is_fresh(page: str, generator: str, function: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == runpy.run_path(str(ROOT / "docs" / generator))[function](), f"docs/{page} is old: `make docs`."


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs give the headings of a page: words in small letters with dashes between."""
    text = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert [slug for slug, count in Counter(slugs).items() if count > 1] == [], f"{name_of(page)}: headings twice"
    return set(slugs)


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to files or headings that do not exist."""
    broken = []
    for target in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n[a](#one-two-three) [b](#four) [c](gone.md) [d](https://e.f) `[g](h)`\n")
    assert broken_links(page) == ["#four", "gone.md"]


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_of_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(("name", "least"), [("README.md", 8), ("docs/when-trees-pay.md", 7)])
def test_figures_of_a_page_are_those_of_the_performance_pages(name: str, least: int) -> None:
    """The figures of a sentence or a row stand together in one section of a page, and not as the range of another."""
    prose = _LINK.sub("]", _CODE.sub("", (ROOT / name).read_text(encoding="utf-8")))
    lines = [set(re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", line)) for line in prose.splitlines()]
    measured = "\n".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("performance", "performance-gpu"))
    measured = re.sub(r"(?<=\d) \([\d.]+ to [\d.]+\)(?= \|)", "", measured)
    sections = [set(re.findall(r"\d+\.\d+", section)) for section in re.split(r"^##+ ", measured, flags=re.MULTILINE)]
    assert len([line for line in lines if line]) >= least
    assert [line for line in lines if not any(line <= section for section in sections)] == []


def test_public_names_are_on_their_page() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)\.(\w+)$", page, re.MULTILINE)
    assert [name for module, name in names if not hasattr(importlib.import_module(module), name)] == []
    faces = {name for face in ("treepo_trl", "treepo_trl.engines") for name in importlib.import_module(face).__all__}
    assert faces - {name for _, name in names} == {"__version__"}


@pytest.mark.parametrize("name", ["measure_words", "site_hooks"])
def test_examples_of_the_scripts(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"docs.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
