"""
Draw the pictures of the pages: `docs/tree.svg`, and one for each page of `docs/how-it-works/`.

    python -m docs.make_pictures

Standard library only. The colours are readable on a white and on a black page.
"""

from collections.abc import Callable
from pathlib import Path

from docs.svg import BLUE, GREEN, GREY, ORANGE, VIOLET, arrow, box, edge, frame, named_box, picture, text


FOLDER = Path(__file__).parent
DEPTH_COLOURS = (BLUE, GREEN, VIOLET)  # first, second, third segment
PROMPT = (64, 26)
SEGMENT = (68, 15)
ROW = 27  # between two answers, in pixels
STEP = 92  # between the left edges of two segments of a path


def tree() -> str:
    """Eight answers of three segments, one by one and as a tree."""
    title = "Eight answers of three segments: 24 segments one by one, 14 as a tree"
    return picture(860, 350, title, [*_half(40, "One by one", (8, 8, 8)), *_half(474, "As a tree", (2, 4, 8))])


def _half(left: float, name: str, levels: tuple[int, ...]) -> list[str]:
    """One half of the picture: its title, prompt, paths, and the number of segments below each level."""
    top, height = 76, 350
    first = left + PROMPT[0] + 30
    edges, segments = [], []
    for depth, count in enumerate(levels):
        x = first + depth * STEP
        parents = levels[depth - 1] if depth else 1
        for i, y in enumerate(_heights(top, count)):
            start = x - STEP + SEGMENT[0] if depth else left + PROMPT[0]
            edges.append(edge(start, _heights(top, parents)[i * parents // count], x, y))
            segments.append(box(x, y, SEGMENT, DEPTH_COLOURS[depth]))
    sums = [
        text(first + depth * STEP + SEGMENT[0] / 2, height - 50, str(count), 16, DEPTH_COLOURS[depth])
        for depth, count in enumerate(levels)
    ]
    signs = [text(first + (depth + 1) * STEP - (STEP - SEGMENT[0]) / 2, height - 50, "+", 16) for depth in (0, 1)]
    centre = first + (2 * STEP + SEGMENT[0]) / 2
    return [
        text(centre, 30, name, 19),
        *edges,
        named_box(left, _heights(top, 1)[0], PROMPT, GREY, "prompt"),
        *segments,
        *sums,
        *signs,
        text(centre, height - 16, f"{sum(levels)} segments", 19),
    ]


def _heights(top: float, count: int, of: int = 8) -> list[float]:
    """Middles of the boxes of a level, spread evenly over the answers."""
    share = of / count
    return [top + ROW * (share * i + (share - 1) / 2) for i in range(count)]


def sampling() -> str:
    """A tree of eight leaves, level by level, one of whose paths ends early."""
    children = {0: (0, 1, 2), 1: (3,), 2: (4, 5), 3: (6, 7)}  # rows of the third level below each of the second
    ended, top, left, step = 1, 92, 40, 200  # the path of the second level that ends: its row is a leaf
    first, wide = left + PROMPT[0] + 40, (108, 18)
    rows = [top + ROW * row for row in range(8)]
    middles = {path: sum(rows[row] for row in leaves) / len(leaves) for path, leaves in children.items()}
    parents = [(middles[0] + middles[1]) / 2, (middles[2] + middles[3]) / 2]
    prompt = sum(parents) / 2
    columns = [first + step * depth for depth in range(3)]
    parts = [edge(left + PROMPT[0], prompt, columns[0], y) for y in parents]
    parts += [edge(columns[0] + wide[0], parents[path // 2], columns[1], y) for path, y in middles.items()]
    parts += [
        edge(columns[1] + wide[0], middles[path], columns[2], rows[row])
        for path, leaves in children.items()
        if path != ended
        for row in leaves
    ]
    parts.append(named_box(left, prompt, PROMPT, GREY, "prompt"))
    parts += [box(columns[0], y, wide, BLUE) for y in parents]
    parts += [box(columns[1], y, wide, ORANGE if path == ended else GREEN) for path, y in middles.items()]
    live = [row for path, leaves in children.items() if path != ended for row in leaves]
    parts += [box(columns[2], rows[row], wide, VIOLET) for row in live]
    parts.append(text(columns[1] + wide[0] + 10, middles[ended] + 5, "ends here", 14, ORANGE, "start"))
    counts = ("2 segments", "4 segments", f"{len(live)} segments")
    for depth, count in enumerate(counts):
        middle = columns[depth] + wide[0] / 2
        parts += [text(middle, 30, f"level {depth + 1}", 17), text(middle, 54, count, 14, DEPTH_COLOURS[depth])]
    parts.append(text(columns[2] + wide[0] / 2, rows[-1] + 40, f"8 leaves: {len(live)} and the one that ended", 14))
    return picture(790, 340, "A tree of eight leaves in three levels of 2, 4 and 7 segments", parts)


THREE_ANSWERS = (("3 + 4 = 7,", ("7 + 5 = 12", 1), ("7 + 5 = 13", 0)), ("3 + 4 = 8,", ("8 + 5 = 13", 0)))
"""The tree of `docs/words.md`: first segments, and below each the second ones with their rewards."""


def advantages() -> str:
    """Two segments of a tree of three answers, and what each is compared with."""
    parts = [
        *_comparison(70, "3 + 4 = 7,", "1/2", "0", "+ 1/2"),
        *_comparison(300, "7 + 5 = 12", "1", "0", "+ 1"),
    ]
    return picture(780, 420, "A segment is compared with the leaves that are not below it", parts)


def _comparison(top: float, judged: str, value: str, others: str, advantage: str) -> list[str]:
    """The tree with the judged segment and its leaves in one colour, and the leaves it is compared with in another."""
    left, size, gap = 40, (112, 28), 44
    columns = (left + PROMPT[0] + 40, left + PROMPT[0] + 40 + size[0] + 40)
    middle = top + gap * 3 / 4
    parts, boxes, row = [], [], 0
    for first, *leaves in THREE_ANSWERS:
        y = top + gap * (row + (len(leaves) - 1) / 2)
        parts.append(edge(left + PROMPT[0], middle, columns[0], y))
        boxes.append(named_box(columns[0], y, size, BLUE if first == judged else GREY, first))
        for leaf, reward in leaves:
            colour = BLUE if judged in (first, leaf) else ORANGE
            leaf_y = top + gap * row
            parts.append(edge(columns[0] + size[0], y, columns[1], leaf_y))
            boxes.append(named_box(columns[1], leaf_y, size, colour, leaf))
            boxes.append(text(columns[1] + size[0] + 14, leaf_y + 5, f"reward {reward}", 14, colour, "start"))
            row += 1
    x = columns[1] + size[0] + 120
    return [
        text(left, top - 40, f"How good is “{judged}”?", 16, anchor="start"),
        *parts,
        named_box(left, middle, PROMPT, GREY, "prompt"),
        *boxes,
        text(x, top + 5, f"leaves below it: mean {value}", 14, BLUE, "start"),
        text(x, top + gap + 5, f"the other leaves: mean {others}", 14, ORANGE, "start"),
        text(x, top + 2 * gap + 5, f"advantage: {advantage}", 15, anchor="start"),
    ]


ROWS = ("PQRABCx", "PQRABCy", "PQRDEFz")
"""Three rows of a micro-batch, a letter a token; the prompt is PQR."""


def packed(rows: tuple[str, ...]) -> tuple[list[str], list[int], list[int | None]]:
    """
    The packed row of some rows in depth-first order: a token, its position and its parent for each place.

    A place is a prefix with its next token, so a token that two next tokens follow has two places.
    """
    places: dict[str, int] = {}
    tokens, positions, parents = [], [], []
    for row in rows:
        for position, token in enumerate(row):
            name = f"{row}."[: position + 2]  # behind its last token a row has a full stop
            if name not in places:
                parents.append(places[row[: position + 1]] if position else None)
                places[name] = len(tokens)
                tokens.append(token)
                positions.append(position)
    return tokens, positions, parents


def update() -> str:
    """Three rows that share prefixes, the packed row, and what each of its tokens sees."""
    tokens, positions, parents = packed(ROWS)
    colour = dict.fromkeys("PQR", GREY) | dict.fromkeys("ABCxy", BLUE) | dict.fromkeys("DEFz", GREEN)
    left, size, step = 40, (24, 24), 28
    parts = [text(left, 34, f"{len(ROWS)} rows, {sum(map(len, ROWS))} tokens", 16, anchor="start")]
    for r, row in enumerate(ROWS):
        y = 66 + 32 * r
        parts += [named_box(left + step * i, y, size, colour[token], token) for i, token in enumerate(row)]
    parts += [
        arrow(left + 110, 152, left + 110, 186),
        text(left, 216, f"one packed row, {len(tokens)} tokens", 16, anchor="start"),
    ]
    for place, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        x = left + step * place
        parts += [named_box(x, 248, size, colour[token], token), text(x + 12, 280, str(position), 12)]
    parts.append(text(left, 302, "position of each token", 13, anchor="start"))
    return picture(
        800, 320, "Three rows of 21 tokens become one packed row of 14", [*parts, *_mask(tokens, parents, colour)]
    )


def _mask(tokens: list[str], parents: list[int | None], colour: dict[str, str]) -> list[str]:
    """The attention mask of a packed row: a line for each token, a cell for each token that it sees."""
    left, top, cell = 530, 66, 16
    parts = [text(left - 20, 34, "what each token sees", 16, anchor="start")]
    for place, token in enumerate(tokens):
        parts.append(text(left - 12, top + cell * place + 12, token, 12, colour[token]))
        parts.append(text(left + cell * place + 8, top - 6, token, 12, colour[token]))
        seen: int | None = place
        while seen is not None:
            x, y = left + cell * seen, top + cell * place + cell / 2
            parts.append(box(x + 1, y, (cell - 2, cell - 2), colour[token]))
            seen = parents[seen]
    return parts


def lora_and_vllm() -> str:
    """Policy and engine with the same base; only the adapter travels."""
    wide, flat = (200, 70), (200, 34)
    left, right, top = 60, 440, 50
    parts = []
    for x, name, job in ((left, "policy", "computes the loss"), (right, "engine", "samples segments")):
        parts += [
            text(x + 120, 28, name, 18),
            frame(x, top, (240, 190)),
            named_box(x + 20, top + 42, flat, BLUE, "adapter"),
            named_box(x + 20, top + 118, wide, GREY, "base, frozen"),
            text(x + 120, top + 178, job, 14),
        ]
    parts += [
        arrow(left + 228, top + 42, right + 12, top + 42, BLUE),
        text(370, top + 24, "before each", 13, BLUE),
        text(370, top + 64, "generation", 13, BLUE),
        text(370, top + 112, "the same", 13),
        text(370, top + 130, "weights", 13),
        arrow(right - 6, top + 172, left + 246, top + 172),
        text(370, top + 164, "trees", 13),
    ]
    return picture(740, 260, "Policy and engine hold the same base, and only the adapter travels", parts)


def dynamic_sampling() -> str:
    """A batch of three prompts, two of which are replaced in two rounds."""
    right, wrong, mixed = (1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 0)
    rounds = (
        ("batch", (("2 + 2", right), ("3 + 4", mixed), ("9 x 8", wrong))),
        ("round 1", (("5 + 6", mixed), ("3 + 4", mixed), ("7 x 7", wrong))),
        ("round 2", (("5 + 6", mixed), ("3 + 4", mixed), ("4 - 1", mixed))),
    )
    left, top, step, gap = 120, 44, 210, 84
    parts = []
    for r, (name, prompts) in enumerate(rounds):
        y = top + gap * r
        parts.append(text(left - 24, y + 5, name, 15, anchor="end"))
        for p, (prompt, rewards) in enumerate(prompts):
            x = left + step * p
            has_signal = len(set(rewards)) > 1
            colour = GREEN if has_signal else ORANGE
            parts.append(frame(x, y - 24, (180, 48), colour))
            parts.append(text(x + 44, y + 5, prompt, 15, colour))
            parts += [_reward(x + 96 + 22 * i, y, reward, colour) for i, reward in enumerate(rewards)]
            if r + 1 < len(rounds) and not has_signal:
                parts.append(arrow(x + 90, y + 28, x + 90, y + gap - 28, ORANGE))
                parts.append(text(x + 102, y + 47, "replaced", 13, ORANGE, "start"))
    y = top + gap * len(rounds) - 26
    parts += [_reward(left, y, 1, GREY), text(left + 14, y + 5, "right", 13, anchor="start")]
    parts += [_reward(left + 80, y, 0, GREY), text(left + 94, y + 5, "wrong", 13, anchor="start")]
    parts.append(text(left + step, y + 5, "an arrow: all rewards are equal", 13, anchor="start"))
    return picture(760, 310, "Prompts whose completions all have one reward give their place to others", parts)


def _reward(x: float, y: float, reward: int, colour: str) -> str:
    fill = colour if reward else "none"
    return f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="{fill}" stroke="{colour}" stroke-width="2"/>'


def turns() -> str:
    """Two answers that share a tool's call: it runs once, and paths go on behind its answer."""
    size, answer = (112, 28), (52, 28)
    columns = (40, 144, 300, 396, 552, 648)
    upper, lower = 50, 130
    middle = (upper + lower) / 2
    parts = [
        edge(104, middle, columns[1], middle),
        edge(columns[1] + size[0], middle, columns[2], middle),
        edge(columns[2] + answer[0], middle, columns[3], upper),
        edge(columns[2] + answer[0], middle, columns[3], lower),
        edge(columns[3] + size[0], upper, columns[4], upper),
        edge(columns[4] + answer[0], upper, columns[5], upper),
        named_box(columns[0], middle, PROMPT, GREY, "prompt"),
        named_box(columns[1], middle, size, BLUE, "add(3, 4)"),
        named_box(columns[2], middle, answer, ORANGE, "7", dashed=True),
        named_box(columns[3], upper, size, GREEN, "add(7, 5)"),
        named_box(columns[3], lower, size, GREEN, "It is 13."),
        named_box(columns[4], upper, answer, ORANGE, "12", dashed=True),
        named_box(columns[5], upper, size, VIOLET, "It is 12."),
        text(columns[5] + size[0] + 14, upper + 5, "reward 1", 14, anchor="start"),
        text(columns[3] + size[0] + 14, lower + 5, "reward 0", 14, anchor="start"),
        text(columns[2] + answer[0] / 2, middle + 44, "runs once", 13, ORANGE),
        box(columns[0], 190, (22, 14), BLUE),
        text(columns[0] + 32, 195, "a turn: sampled", 13, anchor="start"),
        box(columns[2], 190, (22, 14), ORANGE, dashed=True),
        text(columns[2] + 32, 195, "an answer: not sampled", 13, anchor="start"),
    ]
    return picture(860, 220, "Two answers share a tool's call, which runs once", parts)


PICTURES: dict[str, Callable[[], str]] = {
    "tree.svg": tree,
    "how-it-works/sampling.svg": sampling,
    "how-it-works/advantages.svg": advantages,
    "how-it-works/update.svg": update,
    "how-it-works/lora-and-vllm.svg": lora_and_vllm,
    "how-it-works/dynamic-sampling.svg": dynamic_sampling,
    "how-it-works/turns.svg": turns,
}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
