"""
How easy the code is to take over: sizes, imports, types, tests and prose of this checkout, beside those of older ones.

    python -m benchmarks.house                     # this checkout
    python -m benchmarks.house --tree ../before    # before and after: a column for each tree, this checkout last

Everything is read from files, nothing is imported. Prints a Markdown table.

- Lines are all lines of a file. A function's lines go from its `def` to its end.
- A module is in an import cycle if its imports lead back to it, also those in functions and for types alone.
- An import goes upward by the `FLOORS` of the tree's own `tests/test_layering.py`.
- Sentences of prose have more than two words. Fenced code, tables, headings and addresses of links are left out.
- A setting is described by an entry in a class docstring, by its field's `help`, and by a row of a table in the docs.
  Pages that `make docs` writes do not count, since nobody keeps them up by hand.
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
CONFIGS = ("TreeSamplingConfig", "TreePOConfig")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n|^\s*[-*]", re.MULTILINE)
WORD = re.compile(r"\w[\w'-]*")
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


def floors_of(layering_test: Path) -> list[tuple[str, ...]] | None:
    """`FLOORS` of the tree's layering test, from the ground up, if it has them."""
    if not layering_test.exists():
        return None
    for node in ast.parse(layering_test.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if "FLOORS" in map(ast.unparse, targets):
                return list(ast.literal_eval(node.value))
    return None


def imports_upward(graph: dict[str, set[str]], floors: list[tuple[str, ...]] | None) -> str:
    """How many imports lead to another room on the same floor or on one above."""
    if floors is None:
        return "no floors"
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    pairs = [
        (module, other)
        for module, others in graph.items()
        for other in others
        if module and other and room_of(module) != room_of(other)
    ]
    unknown = {room_of(name) for name in graph if name} - set(floor_of)
    upward = [
        (module, other)
        for module, other in pairs
        if not {room_of(module), room_of(other)} & unknown and floor_of[room_of(other)] >= floor_of[room_of(module)]
    ]
    return f"{len(upward)}" + (f" ({', '.join(sorted(unknown))} have no floor)" if unknown else "")


def room_of(module: str) -> str:
    """The folder or the module beside the trainer."""
    return module.split(".")[0]


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


# Tests


def tests_importing_tests(tests: Sources) -> int:
    """Test files that import from another test file."""

    def does(path: Path) -> bool:
        for statement in import_statements(tests.trees[path]):
            dotted = [alias.name for alias in statement.names]
            if isinstance(statement, ast.ImportFrom):
                dotted += (statement.module or "").split(".")
            if any(part.startswith("test_") for name in dotted for part in name.split(".")):
                return True
        return False

    return sum(does(path) for path in tests.paths if path.name.startswith("test_"))


# Prose


def sentence_lengths(markdown: str) -> list[int]:
    """Words of each sentence that has more than two, without fenced code, tables, headings and addresses."""
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"^[|#].*$", "", text, flags=re.MULTILINE)
    counts = [len(WORD.findall(sentence)) for sentence in SENTENCE_END.split(text)]
    return [count for count in counts if count > 2]


def prose(pages: Iterable[Path]) -> str:
    """Mean and longest number of words in a sentence of these pages."""
    lengths = [length for page in pages for length in sentence_lengths(page.read_text(encoding="utf-8"))]
    return f"{statistics.mean(lengths):.1f}, {max(lengths)}" if lengths else "-"


# Settings


def settings(package: Sources) -> dict[str, int]:
    """Places in the code that describe each setting: its field's `help`, and an entry in a class docstring."""
    definitions = package.classes(CONFIGS)
    fields = [
        statement
        for definition in definitions
        for statement in definition.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call)
    ]
    places = {ast.unparse(field.target): int('"help"' in ast.unparse(field).replace("'", '"')) for field in fields}
    for definition in definitions:
        for name in re.findall(r"^\s+(\w+) \(.*\):$", ast.get_docstring(definition) or "", flags=re.MULTILINE):
            places[name] += name in places
    return places


def described_settings(package: Sources, pages: Iterable[Path]) -> list[int]:
    """How many places describe each setting, tables of pages that are kept up by hand included."""
    places = settings(package)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if "`make docs`" in text[:1000]:
            continue
        for name in re.findall(r"^\|\s*`(\w+)`[^|]*\|", text, flags=re.MULTILINE):
            if name in places:
                places[name] += 1
    return list(places.values())


def measure(tree: Path) -> dict[str, str]:
    """Every row of the table for one tree."""
    package, tests = Sources(tree / "src" / PACKAGE), Sources(tree / "tests")
    lengths = sorted(length for length, _ in package.functions)
    length, function = max(package.functions)
    graph = import_graph(package)
    source_lines, test_lines = sum(package.lines.values()), sum(tests.lines.values())
    pages = sorted((tree / "docs").rglob("*.md"))
    places = described_settings(package, pages)
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
        "imports upward": imports_upward(graph, floors_of(tree / "tests/test_layering.py")),
        "attributes set on the trainer's `self`": f"{attributes_on_self(package, TRAINER)}",
        "test lines per source line": f"{test_lines / source_lines:.2f} ({test_lines})",
        "longest test file": tests.longest(),
        "test files that import a test file": f"{tests_importing_tests(tests)}",
        "words per sentence of the README, mean, longest": prose([tree / "README.md"]),
        "words per sentence of the docs, mean, longest": prose(pages),
        "places that describe a setting, mean, most": (
            f"{statistics.mean(places):.2f}, {max(places)} ({len(places)} settings)"
        ),
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
