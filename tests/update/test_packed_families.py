"""Families of `docs/models.md` that pack: log-probabilities and gradients are those of the plain rows."""

import dataclasses
import json

import pytest

from tests.support.families import FAMILIES, FAMILY, Family
from tests.support.family_checks import batches, compare_packed
from tests.support.paths import ROOT
from tests.support.rows import trees
from treepo_trl.update import tree_attention


pytestmark = pytest.mark.filterwarnings("ignore")
WINDOWED = {"sliding_attention": FAMILY["Gemma 3"], "chunked_attention": FAMILY["Llama 4"]}
FACTS = json.loads((ROOT / "docs/models.json").read_text(encoding="utf-8"))["families"]
PACKED = [family for family in FAMILIES if FACTS[family.name]["facts"]["not_packed"] is None]
"""Those that tests/test_models_page.py finds to pack; the others say why not there."""


@pytest.mark.parametrize("rows", list(batches()))
@pytest.mark.parametrize("family", PACKED, ids=lambda family: family.name)
def test_packed_rows_are_the_plain_ones(family: Family, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths beyond a window and within it, a window longer and shorter than segments, one leaf, identical leaves."""
    monkeypatch.setattr(tree_attention, "_QUERY_BLOCK", 8)
    found = compare_packed(family.model(), batches()[rows])
    assert found.logps < 1e-4
    assert found.gradients < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 3, 6, 100])
@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_windows_and_chunks_of_any_size(kind: str, window: int, attention: str) -> None:
    """Segments of the trees have 1 to 4 tokens, paths up to 14."""
    family = WINDOWED[kind]
    changes = {**family.changes, "sliding_window": window, "attention_chunk_size": window}
    resized = dataclasses.replace(family, changes=changes, attention=attention)
    found = compare_packed(resized.model(), trees(2))
    assert found.logps < 1e-4
    assert found.gradients < 1e-5
