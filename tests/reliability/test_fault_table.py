"""Each row of the table of faults names a test that exists."""

import re

from tests.support.paths import ROOT


def test_each_row_names_tests_that_exist() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    rows = page.split("| fault |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
