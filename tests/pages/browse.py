"""How the page tests look at a page: visits that note what went wrong, and figures read back from plotly.js."""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from pathlib import Path

import axe_core_python
import nbformat
import numpy as np

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
PLOTLY = "application/vnd.plotly.v1+json"
# Every figure: reveal it when it is covered, scroll it into view, wait until it is drawn.
DRAW_ALL = """async () => {
  for (const figure of document.querySelectorAll(".lcx-figure")) {
    figure.querySelector(".lcx-predict .lcx-quiet")?.click();
    figure.scrollIntoView();
    for (let i = 0; i < 300 && !figure.dataset.ready; i++) await new Promise((ok) => setTimeout(ok, 50));
  }
  scrollTo(0, 0);
  return [...document.querySelectorAll(".lcx-figure")].filter((f) => !f.dataset.ready).length;
}"""
# The data on show, typed arrays made plain.
STATE = """(figure) => {
  const plain = (v) => ArrayBuffer.isView(v) ? Array.from(v) : Array.isArray(v) ? v.map(plain) : v;
  const plot = figure.querySelector(".lcx-plot");
  const data = plot._fullData.map((t) => Object.fromEntries(
    ["x", "y", "z", "text", "values", "labels", "r", "theta"].filter((k) => t[k] !== undefined).map((k) => [k, plain(t[k])])));
  const layout = JSON.parse(JSON.stringify(plot.layout, (k, v) => k.startsWith("_") ? undefined : v));
  return { data, layout, state: figure.dataset.state };
}"""


@contextmanager
def opened(browser, site, path: str, *, theme: str = "light", width: int = 1400, **context):
    """A page of the book in a fresh browser context. `page.noted` collects what should not happen."""
    ctx = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900}, **context)
    page = ctx.new_page()
    page.noted = {"foreign": [], "errors": [], "missing": [], "loaded": []}
    page.on(
        "request",
        lambda r: (
            None if r.url.startswith((site.url, "data:", "blob:")) else page.noted["foreign"].append(r.url)
        ),
    )
    page.on("pageerror", lambda e: page.noted["errors"].append(str(e)))
    page.on("console", lambda m: page.noted["errors"].append(m.text) if m.type == "error" else None)
    page.on("response", lambda r: page.noted["missing" if r.status >= 400 else "loaded"].append(r.url))
    try:
        page.goto(site.url + path, wait_until="load")
        yield page
    finally:
        ctx.close()


def draw_all(page) -> int:
    """Draw every figure of the page; returns how many stayed empty."""
    return page.evaluate(DRAW_ALL)


def axe(page) -> list[str]:
    """Serious and critical violations of WCAG 2.1 AA, one line each."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    return [
        f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:160]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def figures_of(run: Path) -> list[dict]:
    """The Plotly outputs of an executed notebook, in order."""
    nb = nbformat.read(run, as_version=4)
    return [o["data"][PLOTLY] for c in nb.cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})]


def plain(value):
    """A value of a figure's JSON with packed arrays unpacked."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
        if value.get("shape"):
            array = array.reshape([int(n) for n in str(value["shape"]).split(",")])
        return array.tolist()
    return value


def same(shown, expected) -> bool:
    """Equal, up to the last bits of a float and to null for NaN."""
    if isinstance(expected, list | tuple):
        return isinstance(shown, list) and len(shown) == len(expected) and all(map(same, shown, expected))
    if (
        isinstance(expected, float | int)
        and isinstance(shown, float | int)
        and not isinstance(expected, bool)
    ):
        return abs(shown - expected) <= 1e-12 * max(1.0, abs(expected))
    if isinstance(expected, float) and expected != expected:
        return shown is None
    return shown == expected


def contains(shown, part) -> bool:
    """Whether the nested dict `part` is in `shown`."""
    if isinstance(part, dict) and "bdata" not in part:
        return isinstance(shown, dict) and all(k in shown and contains(shown[k], v) for k, v in part.items())
    return same(shown, plain(part))


def differences(page, figure, spec: dict, at: list[int]) -> list[str]:
    """Where the figure on show differs from the frame that its controls ask for."""
    frame = next(f for f in spec["frames"] if f["name"] == ".".join(map(str, at)))
    now = figure.evaluate(STATE)
    wrong = [] if now["state"] == frame["name"] else [f"state {now['state']} instead of {frame['name']}"]
    for i, change in zip(frame["traces"], frame["data"], strict=True):
        for key in change.keys() & {"x", "y", "z", "text", "values", "labels", "r", "theta"}:
            shown = now["data"][i].get(key, [])  # plotly.js drops the arrays of a trace without points
            if not same(shown, plain(change[key])):
                wrong.append(f"trace {i}: {key} is {json.dumps(shown)[:120]}")
    layout = {k: v for k, v in (frame.get("layout") or {}).items() if k not in ("sliders", "updatemenus")}
    return wrong + [f"layout.{k}" for k, v in layout.items() if not contains(now["layout"].get(k), v)]
