"""Draw the one picture of the front page and the README: `python book/picture.py` writes _static/picture.svg.

It is a schematic: no number in it is measured. The same call gives the same bytes, so a test can tell an outdated file.
Each row brings its own background, so it can be read on a light and on a dark page whatever the page's own switch says.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "_static" / "picture.svg"

WIDTH, ROW, GAP = 640, 178, 12  # of the drawing, of one row, between rows
LEFT, PITCH, CELL, TALL = 20, 15, 11, 18  # a token is a cell, CELL wide and TALL high, one every PITCH
TOKENS, WINDOW = 40, 10  # the text, and how many of its last tokens the model sees at once
FACT, QUESTION = 11, TOKENS - 1  # where the fact stands, and the token that needs it
BLOCK = 5  # tokens of a block, its landmark included

# Colours from lcx.figures.COLORS; the second of each pair is for a dark surrounding.
STYLE = """
.card{fill:#f5f6f8;stroke:#c9ced6}.ink{fill:#1b1f24}.soft{fill:#4a525c}.cell{fill:#aab1bb}.lost{fill:#dfe3e8}
.fact{fill:#d55e00}.ask{fill:#0072b2}.mark{fill:#c98a00}.line{fill:none;stroke:#4a525c;stroke-width:1.5}
.view{fill:none;stroke:#0072b2;stroke-width:2.5}.store{fill:none;stroke:#00795a;stroke-width:2.5}
.reach{fill:none;stroke:#0072b2;stroke-width:2}.open{fill:none;stroke:#d55e00;stroke-width:2.5}
.thin{fill:none;stroke:#0072b2;stroke-width:1;stroke-dasharray:3 3}
text{font-family:system-ui,sans-serif;font-size:18px}.title{font-size:21px;font-weight:700}.end{text-anchor:end}.mid{text-anchor:middle}
@media (prefers-color-scheme:dark){
.card{fill:#1c2027;stroke:#3d4550}.ink{fill:#f0f2f5}.soft{fill:#b9c1cb}.cell{fill:#7b8490}.lost{fill:#3a414b}
.fact{fill:#ff8a3d}.ask{fill:#56b4e9}.mark{fill:#f0b429}.line{stroke:#b9c1cb}
.view,.reach,.thin{stroke:#56b4e9}.store{stroke:#2fc79b}.open{stroke:#ff8a3d}
}
"""

TITLE = "Three ways to give a language model a longer memory"
DESCRIPTION = (
    "Schematic in four rows. A long text is a row of tokens with one fact far from the question at its end. "
    "One: a model sees only its window, and the fact lies outside. "
    "Two, Focused Transformer: some layers also read a memory of keys and values of the older text. "
    "Three, Landmark Attention: the older text is cut into blocks, each closed by a landmark token; "
    "the question looks at the landmarks and opens the best block. "
    "Four, CREAM: in training, the positions of a short text are moved apart, so that a head, a middle and a tail cover "
    "all distances of a long text."
)


def cell(x: float, y: float, kind: str = "cell") -> str:
    """One token at (x, y). The fact and the question are taller, so that colour is not the only sign."""
    up = 5 if kind in ("fact", "ask") else 0
    return f'<rect class="{kind}" x="{x:g}" y="{y - up:g}" width="{CELL}" height="{TALL + 2 * up}" rx="2"/>'


def landmark(x: float, y: float) -> str:
    """A landmark token: a diamond."""
    m, c = x + CELL / 2, y + TALL / 2
    return f'<path class="mark" d="M{m:g} {c - 10:g}l6 10l-6 10l-6 -10z"/>'


def box(kind: str, first: int, last: int, y: float, pad: int = 6) -> str:
    """A frame around the tokens first … last."""
    x, width = at(first) - 4, (last - first) * PITCH + CELL + 8
    return f'<rect class="{kind}" x="{x:g}" y="{y - pad - 4:g}" width="{width:g}" height="{TALL + 2 * pad + 8:g}" rx="6"/>'


def path(kind: str, d: str) -> str:
    return f'<path class="{kind}" d="{d}"/>'


def text(x: float, y: float, words: str, kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def at(token: int) -> float:
    """The x of a token, a little apart where the window begins."""
    return LEFT + token * PITCH + (0 if token < TOKENS - WINDOW else 4)


def kind_of(token: int, plain: str = "cell") -> str:
    return {FACT: "fact", QUESTION: "ask"}.get(token, plain)


def row(number: int, title: str, words: str, *drawing: str) -> str:
    """A card with a title and one sentence; the drawing's own y counts from the top of the card."""
    top = number * (ROW + GAP) + 1
    card = f'<rect class="card" x="1" y="0" width="{WIDTH - 2}" height="{ROW}" rx="8"/>'
    head = text(LEFT, 30, title, "title ink") + text(LEFT, 54, words)
    return f'<g transform="translate(0 {top})">{card}{head}{"".join(drawing)}</g>'


def problem() -> str:
    y = 104
    older = range(TOKENS - WINDOW)
    return row(
        0,
        "The problem",
        "A model sees only the last tokens: its window.",
        *(cell(at(t), y, kind_of(t, "lost" if t in older else "cell")) for t in range(TOKENS)),
        box("view", TOKENS - WINDOW, QUESTION, y),
        text(at(FACT) + CELL / 2, y - 16, "a fact, out of reach", "soft mid"),
        text(at(QUESTION) + CELL, y - 22, "the question", "soft end"),
        text(at(0), y + 50, "a long text, one cell a token"),
        text(at(QUESTION) + CELL, y + 50, "window", "soft end"),
    )


def focused() -> str:
    y, first = 116, TOKENS - WINDOW
    layers = [66, 74, 82, 90, 98]  # a stack of layers above the window; two of them read the memory
    bars = [
        f'<rect class="{"ask" if n in (1, 3) else "lost"}" x="{at(first) + 40:g}" y="{top}" width="{at(QUESTION) + CELL - at(first) - 40:g}" height="5" rx="2"/>'
        for n, top in enumerate(layers)
    ]
    reach = [
        path(
            "reach",
            f"M{at(first) + 40:g} {layers[n] + 2.5:g}C{at(first) - 60:g} {layers[n] + 2.5 + n:g} {at(FACT) + 40:g} {y - 52 + 6 * n} {at(FACT) + CELL / 2 + 2 * n - 4:g} {y - 8}",
        )
        for n in (1, 3)
    ]
    return row(
        1,
        "Focused Transformer",
        "Some layers (blue) also read stored keys and values.",
        *(cell(at(t), y, kind_of(t)) for t in range(TOKENS)),
        box("store", 0, first - 1, y),
        box("view", first, QUESTION, y),
        *bars,
        *reach,
        text(at(0), y + 48, "memory: keys and values of the older text"),
        text(at(QUESTION) + CELL, y + 48, "window", "soft end"),
    )


def landmarks() -> str:
    y, first = 112, TOKENS - WINDOW
    ends = range(BLOCK - 1, first, BLOCK)
    opened = FACT - FACT % BLOCK
    ask = at(QUESTION) + CELL / 2
    looks = []
    for end in ends:
        x = at(end) + CELL / 2
        looks.append(
            path("thin", f"M{ask:g} {y - 8}C{ask - 60:g} {y - 62} {x + 60:g} {y - 56} {x:g} {y - 6}")
        )
    out, into, low = at(opened + 2) + CELL / 2, at(first) + 20, y + TALL + 10
    return row(
        2,
        "Landmark Attention",
        "Blocks of the older text are opened through landmarks.",
        *looks,
        *(landmark(at(t), y) if t in ends else cell(at(t), y, kind_of(t)) for t in range(TOKENS)),
        box("open", opened, opened + BLOCK - 1, y),
        box("view", first, QUESTION, y),
        path("open", f"M{out:g} {low}C{out + 50:g} {y + 64} {into:g} {y + 64} {into:g} {low + 12}"),
        path("fact", f"M{into:g} {low + 2}l6 11h-12z"),
        text(at(0), y + 52, "◆ landmark token"),
        text(at(QUESTION) + CELL, y + 52, "window", "soft end"),
    )


def cream() -> str:
    y, ruler, first_x = 74, 134, at(15)
    # (first, last + 1, position): tokens of the window, and the position given to the first of them
    runs = ((0, 3, 0), (3, 7, 21), (7, WINDOW, TOKENS - 3))
    parts = []
    for first, last, position in runs:
        window, place = first_x + first * PITCH, LEFT + position * PITCH
        length = (last - first) * PITCH - PITCH + CELL
        parts += [cell(window + n * PITCH, y) for n in range(last - first)]
        parts += [cell(place + n * PITCH, ruler - TALL - 1) for n in range(last - first)]
        parts += [
            path("line", f"M{window + d:g} {y + TALL + 7}L{place + d:g} {ruler - TALL - 4}")
            for d in (0, length)
        ]
    ticks = "".join(f"M{LEFT + n * PITCH} {ruler}v6" for n in range(0, TOKENS + 1, 5))
    return row(
        3,
        "CREAM",
        "Short training texts are given the positions of long ones.",
        *parts,
        f'<rect class="view" x="{first_x - 4}" y="{y - 6}" width="{WINDOW * PITCH + 4}" height="{TALL + 12}" rx="6"/>',
        path("line", f"M{LEFT} {ruler}H{LEFT + TOKENS * PITCH}{ticks}"),
        text(first_x + WINDOW * PITCH + 12, y + 15, "window"),
        text(LEFT, ruler + 28, "position 0: head"),
        text(LEFT + 23 * PITCH, ruler + 28, "middle", "soft mid"),
        text(LEFT + TOKENS * PITCH, ruler + 28, "tail: target length", "soft end"),
    )


def draw() -> str:
    """The whole picture as SVG text."""
    height = 4 * ROW + 3 * GAP + 30
    note = text(WIDTH / 2, height - 8, "Schematic: nothing in this picture is measured.", "note mid")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title description">\n'
        f'<title id="title">{escape(TITLE)}</title>\n<desc id="description">{escape(DESCRIPTION)}</desc>\n'
        f"<style>{STYLE}.note{{fill:#767676}}</style>\n"
        + "\n".join((problem(), focused(), landmarks(), cream(), note))
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    part = PICTURE.with_suffix(".part")
    part.write_text(draw(), "utf-8")
    os.replace(part, PICTURE)
    print(f"wrote {PICTURE}")
