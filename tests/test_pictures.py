"""The pictures of the pages: as the code draws them, and what they show is what the package computes."""

import re

import pytest
import torch

from docs.make_pictures import FOLDER, PICTURES, ROWS, packed
from docs.measure_words import measure
from treepo_trl.sampling.branching import level_budget
from treepo_trl.update.advantages import tree_advantages
from treepo_trl.update.packing import pack_rows


HOW_IT_WORKS = sorted((FOLDER / "how-it-works").glob("*.md"))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_drawn(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == PICTURES[name](), f"docs/{name} is old: `make docs`."


@pytest.mark.parametrize("page", HOW_IT_WORKS, ids=lambda page: page.stem)
def test_a_page_opens_with_five_sentences_and_its_picture(page) -> None:
    opening, picture, _ = re.split(r"!\[[^\]]*\]\(([^)]*)\)", page.read_text(encoding="utf-8"), maxsplit=1)
    assert picture == f"{page.stem}.svg"
    assert len(measure(opening).sentences) == 5
    assert measure(opening).lengths[-1] <= 20


def test_the_tree_of_the_sampling_page() -> None:
    # Width 8, two children a path: 2, then 4, one of which ends, so that 7 leaves are missing and three paths live.
    assert level_budget(num_live=2, num_finished=0, num_finished_now=0, num_generations=8, branching_factor=2) == 4
    assert level_budget(num_live=3, num_finished=1, num_finished_now=1, num_generations=8, branching_factor=2) == 7


def test_the_numbers_of_the_advantages_page() -> None:
    rewards, ancestors = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0, 1], [0, 2], [3, 4]])
    found = tree_advantages(rewards, ancestors, "optimal_baseline")
    assert found[0].tolist() == [0.5, 1.0]


def test_the_packed_row_of_the_update_page() -> None:
    tokens, positions, parents = packed(ROWS)
    rows = torch.tensor([[ord(token) for token in row] for row in ROWS])
    expected = pack_rows(rows, torch.ones_like(rows), num_scored=4)
    assert [ord(token) for token in tokens] == expected.input_ids[0].tolist()
    assert positions == expected.position_ids[0].tolist()
    mask = expected.attention_mask()[0, 0]
    for place in range(len(tokens)):
        seen, above = set(), place
        while above is not None:
            seen.add(above)
            above = parents[above]
        assert seen == set(mask[place].nonzero().flatten().tolist())
