"""What the package imports as it is loaded comes with it, without an extra."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Files that are themselves imported by what has found its extra, or by vLLM.
OF_AN_EXTRA = {
    "policy/vllm_classes.py": {"vllm"},
    "quickstart/accuracy.py": {"evaluate"},
}


def required(requirements: list[Requirement]) -> set[str]:
    """Distributions that these bring, themselves included, without extras that nobody asks for."""
    found: set[tuple[str, str]] = set()
    left = [(canonicalize_name(each.name), extra) for each in requirements for extra in ("", *each.extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return {name for name, _ in found}


def imported_on_loading(body: list[ast.stmt]) -> Iterator[str]:
    """Names of the packages that a module imports outside of functions."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.ClassDef):
            yield from imported_on_loading(node.body)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported_on_loading([*node.body, *node.orelse])


@pytest.mark.needs_vllm
def test_imports_on_loading_come_with_the_package() -> None:
    brought, owners = required([Requirement(line) for line in PROJECT["dependencies"]]), packages_distributions()
    for file in (ROOT / "src/treepo_trl").rglob("*.py"):
        place = file.relative_to(ROOT / "src/treepo_trl").as_posix()
        names = set(imported_on_loading(ast.parse(file.read_text()).body)) - {"treepo_trl", *sys.stdlib_module_names}
        missing = {name for name in names if not {canonicalize_name(owner) for owner in owners[name]} & brought}
        assert missing == OF_AN_EXTRA.get(place, set()), place
