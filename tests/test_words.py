"""Words of the README and of the pages: sentences stay short, as `docs/measure_words.py` counts them."""

import pytest

from docs.measure_words import ROOT, measure, pages


README = ROOT / "README.md"

PAGE = """\
# A heading of many words that is no sentence

Three words [right here](page.md#with-an-anchor). Then `one two` and more: five!

| a table | of words |
|---|---|

- One item. It has two sentences.
- `only`, `names`
1. A numbered item that goes on
   in the next line

    python -m indented.code that is no sentence

```python
code = 1  # Not a sentence.
other = 2
```

![A picture](picture.svg)
"""


def test_what_counts_as_a_sentence() -> None:
    page = measure(PAGE)
    assert page.sentences == (
        "Three words right here.",
        "Then CODE and more: five!",
        "One item.",
        "It has two sentences.",
        "A numbered item that goes on in the next line",
    )
    assert page.lengths == [2, 4, 4, 5, 10]
    assert page.mean == 5
    assert (page.code_lines, page.first_code, page.pictures) == (2, 15, 1)


def test_the_readme_has_short_sentences() -> None:
    page = measure(README.read_text(encoding="utf-8"))
    assert len(page.sentences) > 30
    assert page.mean <= 15
    assert [sentence for sentence in page.sentences if len(sentence.split()) > 30] == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_has_short_sentences(path) -> None:
    assert measure(path.read_text(encoding="utf-8")).mean <= 20
