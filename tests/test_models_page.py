"""What docs/models.md says of each family is what the code does today; of vLLM's part, some families."""

import dataclasses
import json
from pathlib import Path

import pytest

from docs.make_models import IN_CI, served_cells, vllm_of
from tests.support.families import FAMILIES, FAMILY, Family
from tests.support.family_checks import facts_of
from tests.support.paths import ROOT


RESULTS = json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8"))["families"]


def test_every_family_is_on_the_page() -> None:
    assert list(RESULTS) == [family.name for family in FAMILIES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_page_is_true(family: Family, tmp_path: Path) -> None:
    found = dataclasses.asdict(facts_of(family, tmp_path))
    assert found == RESULTS[family.name]["facts"], "docs/models.md is old: `python docs/make_models.py --run`."


@pytest.mark.vllm
@pytest.mark.parametrize("name", IN_CI)
def test_what_the_page_says_of_vllm_is_true(name: str) -> None:
    found, written = vllm_of(FAMILY[name]), RESULTS[name]["vllm"]
    assert "error" not in found, found
    assert served_cells(found) == served_cells(written), (
        "docs/models.md is old: `python docs/make_models.py --run-vllm`."
    )
    assert found["moved"] > 0.5  # nats, by the adapter
