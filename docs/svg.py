"""Shapes of the pictures as lines of SVG. Standard library only; the same input gives the same text."""

from collections.abc import Iterable
from html import escape


GREY = "#787d86"
"""Words and lines: the same contrast, 4 to 1, on a white and on a black page."""
BLUE = "#3b82f6"
GREEN = "#14a38b"
VIOLET = "#a66be8"
ORANGE = "#c9731a"
WHITE = "#ffffff"

FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file without a background. The title is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONT}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"]) + "\n"


def box(x: float, y: float, size: tuple[float, float], colour: str, dashed: bool = False) -> str:
    """A filled box from its left edge and the middle of its height; a dashed one is an outline."""
    width, height = size
    fill = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 4"' if dashed else f'fill="{colour}"'
    return f'<rect x="{x:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="5" {fill}/>'


def frame(x: float, y: float, size: tuple[float, float], colour: str = GREY) -> str:
    """The outline of an area, from its upper left corner."""
    width, height = size
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="none" stroke="{colour}" '
        'stroke-width="1.5"/>'
    )


def named_box(x: float, y: float, size: tuple[float, float], colour: str, words: str, dashed: bool = False) -> str:
    """A box with words in its middle."""
    ink = colour if dashed else WHITE
    return box(x, y, size, colour, dashed) + "\n" + text(x + size[0] / 2, y + 4.5, words, 13, ink)


def edge(x1: float, y1: float, x2: float, y2: float) -> str:
    """A curve from a parent to its child."""
    bend = (x1 + x2) / 2
    return (
        f'<path d="M {x1:g} {y1:g} C {bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}" '
        f'fill="none" stroke="{GREY}" stroke-width="1.5"/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = GREY) -> str:
    """A level or upright line with a head at its end."""
    length = abs(x2 - x1) + abs(y2 - y1)
    ahead = ((x2 - x1) / length, (y2 - y1) / length)
    back = (x2 - 8 * ahead[0], y2 - 8 * ahead[1])
    head = " ".join(
        f"{px:g},{py:g}"
        for px, py in (
            (x2, y2),
            (back[0] - 4.5 * ahead[1], back[1] + 4.5 * ahead[0]),
            (back[0] + 4.5 * ahead[1], back[1] - 4.5 * ahead[0]),
        )
    )
    line = f'<path d="M {x1:g} {y1:g} L {back[0]:g} {back[1]:g}" stroke="{colour}" stroke-width="2"/>'
    return f'{line}\n<polygon points="{head}" fill="{colour}"/>'


def text(x: float, y: float, words: str, size: int, colour: str = GREY, anchor: str = "middle") -> str:
    """Words on one line, of which x is the middle, or what `anchor` says."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="600" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(words)}</text>"
    )
