"""
Draw `docs/tree.svg`: eight answers of three segments, one by one and as a tree.

    python docs/tree_picture.py

Standard library only. The colours are readable on a white and on a black page.
"""

from pathlib import Path


PICTURE = Path(__file__).with_name("tree.svg")

NUM_LEAVES = 8
TREE = (2, 4, 8)  # segments of each level of the tree
DEPTH_COLOURS = ("#3b82f6", "#14a38b", "#a66be8")  # blue, green, violet: first, second, third segment
GREY = "#858c96"

WIDTH, HEIGHT = 860, 350
ROW = 27  # between two answers, in pixels
TOP = 76  # middle of the first answer
SEGMENT = (68, 15)  # width and height of a segment
PROMPT = (64, 26)
STEP = 92  # between the left edges of two segments of a path
PANELS = (40, 474)  # left edges of the two halves


def draw() -> str:
    """The picture as the text of an SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>Eight answers of three segments: 24 segments one by one, 14 as a tree</title>",
        *_half(PANELS[0], "One by one", (NUM_LEAVES,) * len(TREE)),
        *_half(PANELS[1], "As a tree", TREE),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _half(left: float, name: str, levels: tuple[int, ...]) -> list[str]:
    """One half of the picture: its title, prompt, paths, and the number of segments below each level."""
    first = left + PROMPT[0] + 30
    middle = TOP + (NUM_LEAVES - 1) * ROW / 2
    edges, segments = [], []
    for depth, count in enumerate(levels):
        x = first + depth * STEP
        parents = levels[depth - 1] if depth else 1
        for i, y in enumerate(_heights(count)):
            start = x - STEP + SEGMENT[0] if depth else left + PROMPT[0]
            edges.append(_edge(start, _heights(parents)[i * parents // count], x, y))
            segments.append(_box(x, y, SEGMENT, DEPTH_COLOURS[depth]))
    sums = [
        _text(first + depth * STEP + SEGMENT[0] / 2, HEIGHT - 50, str(count), 16, DEPTH_COLOURS[depth])
        for depth, count in enumerate(levels)
    ]
    signs = [
        _text(first + (depth + 1) * STEP - (STEP - SEGMENT[0]) / 2, HEIGHT - 50, "+", 16, GREY) for depth in (0, 1)
    ]
    centre = first + (2 * STEP + SEGMENT[0]) / 2
    return [
        _text(centre, 30, name, 19, GREY),
        *edges,
        _box(left, middle, PROMPT, GREY),
        _text(left + PROMPT[0] / 2, middle + 4.5, "prompt", 13, "#ffffff"),
        *segments,
        *sums,
        *signs,
        _text(centre, HEIGHT - 16, f"{sum(levels)} segments", 19, GREY),
    ]


def _heights(count: int) -> list[float]:
    """Middles of the boxes of a level, spread evenly over the answers."""
    share = NUM_LEAVES / count
    return [TOP + ROW * (share * i + (share - 1) / 2) for i in range(count)]


def _box(x: float, y: float, size: tuple[int, int], colour: str) -> str:
    width, height = size
    return f'<rect x="{x:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="5" fill="{colour}"/>'


def _edge(x1: float, y1: float, x2: float, y2: float) -> str:
    bend = (x1 + x2) / 2
    return (
        f'<path d="M {x1:g} {y1:g} C {bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}" '
        f'fill="none" stroke="{GREY}" stroke-width="1.5"/>'
    )


def _text(x: float, y: float, words: str, size: int, colour: str) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="600" text-anchor="middle" fill="{colour}">'
        f"{words}</text>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
