"""That every mutant of the table still applies to the code; whether tests kill it, `benchmarks.mutants` says."""

from benchmarks.mutants import PACKAGE, TABLE, Mutant, read_table
from tests.support.paths import ROOT


MUTANTS = read_table(TABLE)


def named(mutants: list[Mutant]) -> list[str]:
    return [f"{mutant.file}: {mutant.name}" for mutant in mutants]


def test_every_text_stands_once_in_its_file() -> None:
    def times(mutant: Mutant) -> int:
        path = ROOT / "src" / PACKAGE / mutant.file
        return path.read_text(encoding="utf-8").count(mutant.old) if path.exists() else 0

    assert not named([mutant for mutant in MUTANTS if times(mutant) != 1])


def test_every_mutant_is_another_text_under_a_name_of_its_own() -> None:
    assert not named([mutant for mutant in MUTANTS if mutant.new == mutant.old])
    assert len(set(named(MUTANTS))) == len(MUTANTS)


def test_every_mutant_has_tests_and_they_are_there() -> None:
    def is_there(test: str) -> bool:
        file, _, name = test.partition("::")
        path = ROOT / "tests" / file
        return path.exists() and (not name or f"def {name}(" in path.read_text(encoding="utf-8"))

    assert not named([mutant for mutant in MUTANTS if not mutant.tests or not all(map(is_there, mutant.tests))])
