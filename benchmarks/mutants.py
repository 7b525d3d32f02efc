"""
Whether the tests see small errors in the algorithm files: each of a table of mutants, one after the other.

    python -m benchmarks.mutants                        # all of them
    python -m benchmarks.mutants branching dropout      # those whose file or name has one of these words
    python -m benchmarks.mutants --tree ../before       # the code and tests of another checkout

A mutant replaces a text that a file has once, in a copy of the checkout in a temporary folder, and runs the tests that
should fail. The table `data/mutants.toml` has both. Prints for each mutant whether it is killed, lives, or does not
apply, since the code has changed; then the totals. The status is 1 unless all are killed. The tests run without a
mutant first: they must pass.

The processes that run tests are forks of this one, which has loaded the libraries once.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import hypothesis
import pytest

from benchmarks.common import ROOT, make_parser, table_head, table_row


TABLE = Path(__file__).parent / "data/mutants.toml"
COPIED = ("src", "tests", "examples", "docs", "benchmarks", "pyproject.toml", "README.md")
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
LIBRARIES = ("datasets", "peft", "transformers", "trl.trainer.grpo_trainer")
PACKAGE = "treepo_trl"


@dataclass(frozen=True)
class Mutant:
    """A change of one file, and the tests that should see it."""

    file: str
    """Path below the package."""
    name: str
    """What is wrong in it."""
    old: str
    new: str
    tests: tuple[str, ...]
    """Files or names of tests, below `tests/`."""

    def is_named(self, words: list[str]) -> bool:
        """Whether the file or the name has one of these words; without words every mutant counts."""
        return not words or any(word in f"{self.file}: {self.name}" for word in words)

    def in_tree(self, tree: Path) -> "Mutant":
        """The same with those tests alone that a checkout has."""
        has = tuple(test for test in self.tests if (tree / "tests" / test.partition("::")[0]).exists())
        return replace(self, tests=has)


def read_table(path: Path) -> list[Mutant]:
    """The mutants of a table; those without tests of their own have those of their file."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    tests = table.pop("tests")
    return [
        Mutant(file, row["name"], row["old"], row["new"], tuple(row.get("tests", tests[file])))
        for file, rows in table.items()
        for row in rows
    ]


@contextmanager
def copied(tree: Path) -> Iterator[Path]:
    """A copy of what tests need of a checkout."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            source, target = tree / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(folder)


def tests_pass(folder: Path, tests: tuple[str, ...], seconds: int) -> bool:
    """Whether these tests of a checkout pass, each within its time; for a process that has not loaded the package."""
    assert PACKAGE not in sys.modules, "the mutant would not be loaded"
    os.chdir(folder)
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = str(folder / "src")  # for the processes that tests start
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={seconds}"]
    return pytest.main([*options, *(f"tests/{test}" for test in tests)]) == pytest.ExitCode.OK


def verdict(job: tuple[Path, Mutant, int]) -> str:
    """What becomes of a mutant of a checkout."""
    tree, mutant, seconds = job
    with copied(tree) as folder:
        path = folder / "src" / PACKAGE / mutant.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(mutant.old) != 1:
            return "does not apply"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            is_killed = mutant.tests and not tests_pass(folder, mutant.tests, seconds)
        return "killed" if is_killed else "lives"


def passes_unchanged(job: tuple[Path, tuple[str, ...], int]) -> bool:
    """Whether tests of a checkout pass as it is."""
    tree, tests, seconds = job
    with copied(tree) as folder:
        return tests_pass(folder, tests, seconds)


def main() -> None:
    """Print the verdicts and how many there are of each."""
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", help="words of the files or names of mutants")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that run at once")
    parser.add_argument("--seconds", type=int, default=60, help="time limit of a single test")
    options = parser.parse_args()
    tree = options.tree.resolve()
    mutants = [mutant.in_tree(tree) for mutant in read_table(TABLE) if mutant.is_named(options.names)]
    if not mutants:
        parser.error(f"no mutant is named {' or '.join(options.names)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for library in LIBRARIES:
        import_module(library)
    # The same examples each time, and none is made smaller: that one fails is enough.
    hypothesis.settings.register_profile("mutants", phases=PHASES, derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    # Every task has a fork of its own: a process cannot load two versions of the package.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        all_tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        if not pool.map(passes_unchanged, [(tree, all_tests, options.seconds)])[0]:
            sys.exit("These tests fail without a mutant: pytest " + " ".join(f"tests/{test}" for test in all_tests))
        print(table_head("file", "mutant", "verdict"))
        verdicts: Counter[str] = Counter()
        jobs = [(tree, mutant, options.seconds) for mutant in mutants]
        for mutant, result in zip(mutants, pool.imap(verdict, jobs), strict=True):
            verdicts[result] += 1
            print(table_row(mutant.file, mutant.name, result), flush=True)
    print("\n" + ", ".join(f"{count} {result}" for result, count in verdicts.most_common()))
    sys.exit(set(verdicts) != {"killed"})


if __name__ == "__main__":
    main()
