"""Write the measured tables of related-work.md from the committed results: `python book/measured.py`.

A Markdown page cannot compute. Each table stands between two comments and is made anew from book/results, so a test can
tell an outdated page. What is not measured yet says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from lcx.errors import LcxError
from lcx.results import result

PAGE = Path(__file__).parent / "related-work.md"
BLOCK = re.compile(r"(<!-- measured (\w+) -->\n).*?(<!-- end -->)", re.S)

SCALINGS = {
    "linear": "linear",
    "ntk": "NTK-aware",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "selfextend": "SelfExtend",
}
ARMS = {  # of the results, in the order of the tables -> how the page calls it
    "zero-shot": "no training",
    "ordinary": "ordinary labels",
    "randpos": "RandPos",
    "longrecipe": "LongRecipe's labels",
    "pose": "PoSE",
    "cream": "CREAM",
    "cream-released": "CREAM, released sigma",
    "cream-uniform": "CREAM, uniform middle",
    "full": "rows of the target length",
}


def label(arm: str, scaling: str) -> str:
    if arm == "fresh":
        return "fresh windows, the control"
    return "nothing" if scaling == "none" else f"{SCALINGS[scaling]}, {ARMS[arm]}"


def shown(rows: list[dict], scalings: tuple[str, ...]) -> list[tuple[str, str]]:
    """The (arm, scaling) of a table, in its order: what was measured under one of `scalings`."""
    there = {(r["arm"], r["scaling"]) for r in rows}
    return [(arm, s) for arm in ("fresh", *ARMS) for s in scalings if (arm, s) in there]


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def interval(row: dict, low: float = -100, high: float = 100) -> str:
    """The ends of an interval of shares, in percent, cut where they leave what is possible; one seed has none."""
    if row["low"] is None:
        return "–"
    return f"{max(low, 100 * row['low']):z.1f} to {min(high, 100 * row['high']):z.1f}"


def count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def needles(name: str) -> str:
    data = result(name)
    longest = data["window"] * data["factor"]
    at = {(r["arm"], r["scaling"], r["length"]): r for r in data["means"]}
    lengths = sorted({r["length"] for r in data["means"]})
    rows = [
        [label(*arm), *(f"{100 * at[*arm, n]['mean']:.1f}" for n in lengths)]
        + [f"{interval(at[*arm, longest], low=0)} ({count(at[*arm, longest]['seeds'])})"]
        for arm in shown(data["means"], ("none", "yarn", "selfextend"))
    ]
    budget = (
        f"Where trained: {data['steps']:,} steps of {data['batch_size']} rows of {data['window']} tokens."
    )
    head = ["what is done", *(f"{n:,} tokens" for n in lengths), f"95 % interval at {longest:,}"]
    return f"{budget}\n\n{table(head, rows)}"


def pairs(name: str) -> str:
    data = result(name)
    longest = data["window"] * data["factor"]
    names = {"pose": "PoSE", "longrecipe": "LongRecipe's labels", "cream-uniform": "a uniform middle"}
    names |= {"cream-released": "the released sigma"}
    rows = [
        [f"CREAM − {names[r['b']]}", SCALINGS[r["scaling"]], r["depths"]]
        + [f"{100 * r['mean']:+z.1f}", interval(r), f"{r['wins']} of {r['seeds']}"]
        for r in data["paired"]
        if r["a"] == "cream" and r["b"] in names and r["length"] == longest
    ]
    return table(["pair", "RoPE", "depths", "difference", "95 % interval", "seeds in favour"], rows)


def text() -> str:
    data = result("cream-text")
    runs = {
        (arm, scaling): [r["nll"] for r in data["rows"] if (r["arm"], r["scaling"]) == (arm, scaling)]
        for arm, scaling in shown(data["rows"], ("none", *SCALINGS))
    }
    bins = len(data["rows"][0]["nll"])
    parts = (0, bins // 8), (bins // 8, 3 * bins // 4), (3 * bins // 4, bins)
    heads = [f"{a * data['width']:,} to {b * data['width'] - 1:,}" for a, b in parts]
    rows = [
        [label(*run), *(f"{mean(mean(nll[a:b]) for nll in nlls):.2f}" for a, b in parts)] + [str(len(nlls))]
        for run, nlls in runs.items()
    ]
    return table(["what is done", *heads, "seeds"], rows)


def scaling() -> str:
    data, plain = result("smollm2-scaling"), result("smollm2-ppl-by-position")
    half = data["window"] // data["width"]
    unscaled = [plain["plain"][plain["texts"].index(title)] for title in data["texts"]]
    curves = {"none": unscaled, **data["nll"]}
    rows = [
        [SCALINGS.get(name, name)]
        + [f"{mean(mean(nll[part]) for nll in nlls):.2f}" for part in (slice(0, half), slice(half, None))]
        for name, nlls in curves.items()
        if name in SCALINGS or name == "none"
    ]
    return table(["RoPE", f"first {data['window']:,} positions", f"next {data['window']:,}"], rows)


def smollm2() -> str:
    data = result("smollm2-cream")
    longest = data["window"] * data["factor"]
    cells: dict[tuple[str, str], list[dict]] = {}
    for c in data["cells"]:
        if c["length"] == longest:
            cells.setdefault((c["model"], c["task"]), []).append(c)
    tasks = list(data["lengths"])
    share = {key: sum(c["hits"] for c in mine) / sum(c["n"] for c in mine) for key, mine in cells.items()}
    models = list(dict.fromkeys(model for model, _ in cells))
    rows = [[model, *(f"{100 * share[model, task]:.0f}" for task in tasks)] for model in models]
    return table([f"at {longest:,} tokens", *tasks], rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "needles": ("cream-needles", partial(needles, "cream-needles")),
    "pairs": ("cream-needles", partial(pairs, "cream-needles")),
    "far": ("cream-64x", partial(needles, "cream-64x")),
    "farpairs": ("cream-64x", partial(pairs, "cream-64x")),
    "text": ("cream-text", text),
    "scaling": ("smollm2-scaling", scaling),
    "smollm2": ("smollm2-cream", smollm2),
}


def filled(page: str) -> str:
    """The text of the page with its tables made anew."""

    def fill(block: re.Match) -> str:
        name, make = TABLES[block[2]]
        try:
            body = make()
        except LcxError:  # no such result yet
            body = f"Not run yet: `lcx measure {name}` makes it."
        return f"{block[1]}{body}\n{block[3]}"

    return BLOCK.sub(fill, page)


if __name__ == "__main__":
    new = PAGE.with_suffix(".tmp")
    new.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    os.replace(new, PAGE)
