"""
How easy the code is to take over: sizes, imports, types and tests of this checkout, beside those of older ones.

    python -m benchmarks.house                     # this checkout
    python -m benchmarks.house --tree ../before    # before and after: a column for each tree, this checkout last

Everything is read from files, nothing is imported. Prints a Markdown table.

- Lines are all lines of a file. A function's lines go from its `def` to its end.
- A module is in an import cycle if its imports lead back to it, also those in functions and for types alone.

Imports that go upward fail `tests/test_layering.py`, and `docs/measure_words.py` measures the pages.
"""

import ast
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from benchmarks.common import ROOT, make_parser, table_head, table_row


PACKAGE = "treepo_trl"
TRAINER = "TreePOTrainer"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """The Python files below a folder, read and parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(folder.rglob("*.py"))
        self.texts = {path: path.read_text(encoding="utf-8") for path in self.paths}
        self.lines = {path: len(text.splitlines()) for path, text in self.texts.items()}

    @cached_property
    def trees(self) -> dict[Path, ast.Module]:
        """Syntax tree of each file."""
        return {path: ast.parse(text) for path, text in self.texts.items()}

    @cached_property
    def functions(self) -> list[tuple[int, str]]:
        """Lines and name of every function, methods and nested ones included."""
        return [
            (1 + (node.end_lineno or node.lineno) - node.lineno, f"{path.stem}.{node.name}")
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, Function)
        ]

    def name(self, path: Path) -> str:
        """A file's module name below the folder; empty for the folder's own `__init__`."""
        parts = path.relative_to(self.folder).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    def classes(self, names: Iterable[str]) -> list[ast.ClassDef]:
        """The classes with these names."""
        nodes = itertools.chain.from_iterable(map(ast.walk, self.trees.values()))
        return [node for node in nodes if isinstance(node, ast.ClassDef) and node.name in names]

    def longest(self) -> str:
        """Name and lines of the longest file."""
        path = max(self.paths, key=self.lines.__getitem__)
        return f"{self.lines[path]} ({path.relative_to(self.folder)})"


# Imports


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below a node."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def import_graph(package: Sources) -> dict[str, set[str]]:
    """Modules of the package that each module imports by name; the package itself is the empty name."""
    modules = {package.name(path): path for path in package.paths}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: set[str] = set()
        for statement in import_statements(package.trees[path]):
            names |= imported_names(statement, inside)
        graph[module] = {nearest_module(name, modules) for name in names} - {module}
    return graph


def imported_names(statement: ast.Import | ast.ImportFrom, inside: str) -> set[str]:
    """Dotted names below the package that a statement in the folder `inside` imports."""
    if isinstance(statement, ast.Import):
        dotted = [alias.name for alias in statement.names]
    else:
        base = statement.module or ""
        if statement.level:
            parents = inside.split(".") if inside else []
            parents = parents[: len(parents) - statement.level + 1]
            base = ".".join([PACKAGE, *parents, *filter(None, [base])])
        dotted = [f"{base}.{alias.name}" for alias in statement.names]
    return {name.partition(".")[2] for name in dotted if name.split(".")[0] == PACKAGE}


def nearest_module(name: str, modules: Iterable[str]) -> str:
    """The module that a dotted name is, or is defined in."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def modules_in_cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which the imports lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    return [module for module in graph if module in reached(module)]


# Rooms, functions, types, the trainer


def room_sizes(package: Sources) -> dict[str, str]:
    """Files and lines of each folder of the package."""
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for path in package.paths:
        folder = str(path.parent.relative_to(package.folder))
        files[folder] += 1
        lines[folder] += package.lines[path]
    names = {folder: "beside the trainer" if folder == "." else f"in `{folder}/`" for folder in sorted(files)}
    return {f"files, lines {name}": f"{files[folder]}, {lines[folder]}" for folder, name in names.items()}


def attributes_on_self(package: Sources, name: str) -> int:
    """Distinct attributes that a class sets on its own `self`."""
    return len(
        {
            node.attr
            for definition in package.classes([name])
            for node in ast.walk(definition)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    )


def any_per_thousand_lines(sources: Sources) -> float:
    """How often the word `Any` occurs."""
    count = sum(len(re.findall(r"\bAny\b", text)) for text in sources.texts.values())
    return 1000 * count / sum(sources.lines.values())


def measure(tree: Path) -> dict[str, str]:
    """Every row of the table for one tree."""
    package, tests = Sources(tree / "src" / PACKAGE), Sources(tree / "tests")
    lengths = sorted(length for length, _ in package.functions)
    length, function = max(package.functions)
    graph = import_graph(package)
    source_lines, test_lines = sum(package.lines.values()), sum(tests.lines.values())
    return {
        "files, lines of the package": f"{len(package.paths)}, {source_lines}",
        **room_sizes(package),
        "most files in one folder": f"{max(Counter(path.parent for path in package.paths).values())}",
        "longest file": package.longest(),
        "longest function": f"{length} ({function})",
        "lines of a function, median, 90th percentile": (
            f"{statistics.median(lengths):.0f}, {statistics.quantiles(lengths, n=10)[-1]:.0f}"
        ),
        "`Any` per 1,000 lines": f"{any_per_thousand_lines(package):.1f}",
        "modules in import cycles": f"{len(modules_in_cycles(graph))}",
        "attributes set on the trainer's `self`": f"{attributes_on_self(package, TRAINER)}",
        "test lines per source line": f"{test_lines / source_lines:.2f} ({test_lines})",
        "longest test file": tests.longest(),
    }


def main() -> None:
    """Print a column for each tree."""
    parser = make_parser(__doc__)
    parser.add_argument("--tree", type=Path, nargs="+", default=[], help="other checkouts, shown before this one")
    trees = [*parser.parse_args().tree, ROOT]
    columns = [measure(tree.resolve()) for tree in trees]
    print(table_head("", *(tree.resolve().name for tree in trees)))
    names = list(dict.fromkeys(name for column in reversed(columns) for name in column))
    for name in names:
        print(table_row(name, *(column.get(name, "-") for column in columns)))


if __name__ == "__main__":
    main()
