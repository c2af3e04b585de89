"""`show`: publish a figure so that it works in JupyterLab, in Colab and on the static page."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import plotly.graph_objects as go

MIME = "application/vnd.plotly.v1+json"
MAX_BYTES = 300_000  # a figure on the page, as JSON


@dataclass(frozen=True)
class Predict:
    """Ask the reader for a number before the figure is shown; the figure then carries the guess as a line.

    question: what to guess. axis: "x" or "y", where the guess is drawn. low, high, start: the range of the slider,
    in data units. truth: the answer, from the computation. unit: word after the number. log: slider in powers.
    guess: in a live notebook the reader's number (None: not guessed), drawn at once.
    """

    question: str
    truth: float
    low: float
    high: float
    start: float | None = None
    axis: str = "x"
    unit: str = ""
    log: bool = False
    guess: float | None = None

    def __post_init__(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"Predict needs low < high (and low > 0 with log=True), got {self.low} and {self.high}"
            )
        if self.axis not in ("x", "y"):
            raise ValueError(f"Predict: axis must be 'x' or 'y', got {self.axis!r}")


def static() -> bool:
    """True while a notebook is run for the book or by a test (set by the runner): nothing that needs a kernel is shown."""
    return os.environ.get("LCX_STATIC") == "1"


def show(fig: go.Figure, alt: str, *, predict: Predict | None = None) -> None:
    """Publish `fig`. `alt` says in words what the figure shows and what to see in it; it is required.

    In a live notebook a figure with several controls gets ipywidgets; in the static page the same controls are HTML.

    Raises ValueError for an empty `alt`, a `$` in the figure's text (MathJax would take it for a formula) or a figure
    of more than 300 KB as JSON.
    """
    if len(alt.strip()) < 20:
        raise ValueError(
            "show(fig, alt=...): say in a sentence what the figure shows, for readers who cannot see it"
        )
    fig = go.Figure(fig)
    meta: dict[str, Any] = {**(fig.layout.meta or {}), "alt": " ".join(alt.split())}
    if predict is not None:
        meta["predict"] = asdict(predict)
        if predict.guess is not None:
            _draw_guess(fig, predict)
    fig.update_layout(meta=meta)
    json_text = fig.to_json()
    if "$" in json_text:
        raise ValueError("a figure's text may not hold a dollar sign: the page would typeset it as a formula")
    if len(json_text) > MAX_BYTES:
        raise ValueError(
            f"this figure weighs {len(json_text):,} bytes, the limit is {MAX_BYTES:,}: round or thin its data"
        )
    if len(meta.get("controls", ())) > 1 and not static():
        from ..widgets import explore

        return explore(fig)
    _publish(fig, meta["alt"])


def _draw_guess(fig: go.Figure, p: Predict) -> None:
    """The guess as a line with its label; a shape, since annotations count in powers on a logarithmic axis."""
    late = p.guess > (math.sqrt(p.low * p.high) if p.log else (p.low + p.high) / 2)
    text = f"your guess: {p.guess:,g} {p.unit}".rstrip()
    label = {"text": text, "textangle": 0, "textposition": "end"}
    line = {"color": "#D55E00", "dash": "dash", "width": 2}
    if p.axis == "x":
        ends = {"x0": p.guess, "x1": p.guess, "yref": "paper", "y0": 0, "y1": 1}
        label |= {"xanchor": "right" if late else "left", "yanchor": "top"}
    else:
        ends = {"y0": p.guess, "y1": p.guess, "xref": "paper", "x0": 0, "x1": 1}
        label |= {"xanchor": "right", "yanchor": "top" if late else "bottom"}
    fig.add_shape(type="line", name="guess", line=line, label=label, **ends)


def _publish(fig: go.Figure, alt: str) -> None:
    from IPython.display import display

    if (
        "COLAB_RELEASE_TAG" in os.environ and not static()
    ):  # Colab shows no Plotly mimetype; its own renderer does
        fig.show(renderer="colab", config={"showSendToCloud": False, "displaylogo": False})
        return
    spec = fig.to_plotly_json()
    spec["config"] = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
    from plotly.utils import PlotlyJSONEncoder

    display(
        {MIME: json.loads(json.dumps(spec, cls=PlotlyJSONEncoder)), "text/plain": f"[figure: {alt}]"},
        raw=True,
    )
