"""
Measure the words of the README and of the pages: how long the sentences are, how soon code comes.

    python docs/measure_words.py            # one row per page
    python docs/measure_words.py --long 25  # also the sentences of more than 25 words, to rewrite

A sentence ends with `.`, `!` or `?` before a space, or at the end of its paragraph. Headings, tables, code, pictures,
comments and lists of names alone are no sentences; an item of a list is one or more. Code between backticks counts as
one word, and a link as the words that a reader sees.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

_FENCE = re.compile(r"^( *)(```|~~~)[^\n]*\n(.*?)^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`]+`")
_ITEM = re.compile(r"^ *(?:[-*+]|\d+[.)]) +")
_NO_PROSE = re.compile(r"^ *(?:#|\||:::|!!!|---)")
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+")
_SHORT = re.compile(r"\b(e\.g|i\.e|vs|etc|cf|No|Fig|Eq)\.")


@dataclass(frozen=True)
class Measure:
    """What is counted of one page."""

    sentences: tuple[str, ...]
    code_lines: int
    first_code: int | None
    pictures: int

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence, the shortest first."""
        return sorted(len(sentence.split()) for sentence in self.sentences)

    @property
    def mean(self) -> float:
        """Words per sentence."""
        return sum(self.lengths) / max(len(self.lengths), 1)


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def measure(text: str) -> Measure:
    """
    Measure the text of a page.

    >>> page = measure("# Title\\n\\nOne two `three four`. Five [six](page.md).\\n\\n- seven\\n")
    >>> page.sentences
    ('One two CODE.', 'Five six.', 'seven')
    """
    blocks = list(_FENCE.finditer(text))
    return Measure(
        sentences=tuple(_sentences(text)),
        code_lines=sum(len(block[3].splitlines()) for block in blocks),
        first_code=text.count("\n", 0, blocks[0].start()) + 1 if blocks else None,
        pictures=len(_PICTURE.findall(text)),
    )


def _sentences(text: str) -> list[str]:
    found = []
    for paragraph in _paragraphs(_COMMENT.sub("", _FENCE.sub("", text))):
        words = _CODE.sub("CODE", _LINK.sub(r"\1", _PICTURE.sub("", paragraph)))
        words = _SHORT.sub(r"\1", words)
        found += [sentence for sentence in _END.split(words) if re.search(r"\w", sentence.replace("CODE", ""))]
    return found


def _paragraphs(text: str) -> list[str]:
    """The paragraphs and items of lists, each on one line."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        starts_indented = line.startswith("    ") and not found[-1] and not _ITEM.match(line)  # code without a fence
        if not line.strip() or _NO_PROSE.match(line) or starts_indented:
            found.append([])
        elif _ITEM.match(line):
            found.append([_ITEM.sub("", line)])
        else:
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def table(measures: dict[str, Measure]) -> str:
    """The measures as text, a page a line and all pages last."""
    rows = [f"{'page':<40}{'words':>7}{'mean':>7}{'90 %':>6}{'max':>5}{'code':>6}{'first':>7}{'pics':>6}"]
    everything = Measure(tuple(s for page in measures.values() for s in page.sentences), 0, None, 0)
    for name, page in [*measures.items(), ("all pages", everything)]:
        lengths = page.lengths or [0]
        first = "-" if page.first_code is None else page.first_code
        counts = f"{page.code_lines:>6}{first:>7}{page.pictures:>6}" if page is not everything else ""
        percentile = lengths[int(0.9 * (len(lengths) - 1))]
        rows.append(f"{name:<40}{sum(lengths):>7}{page.mean:>7.1f}{percentile:>6}{lengths[-1]:>5}{counts}")
    return "\n".join(rows)


def main() -> None:
    """Print the measures, and the long sentences where they are asked for."""
    parser = argparse.ArgumentParser(description="Measure the words of the README and of the pages.")
    parser.add_argument("--long", type=int, metavar="WORDS", help="print the sentences of more words than this")
    parser.add_argument("pages", nargs="*", type=Path, help="pages to measure; all where none is named")
    arguments = parser.parse_args()
    chosen = [page.resolve() for page in arguments.pages] or pages()
    measures = {page.relative_to(ROOT).as_posix(): measure(page.read_text(encoding="utf-8")) for page in chosen}
    print(table(measures))
    if arguments.long:
        for name, page in measures.items():
            for sentence in page.sentences:
                if len(sentence.split()) > arguments.long:
                    print(f"\n{name}: {len(sentence.split())} words\n    {sentence}")


if __name__ == "__main__":
    main()
