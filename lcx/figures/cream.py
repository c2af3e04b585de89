"""Chapter 10: what models trained under position labels find, by length and depth, and what a missing mask does to attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..measure.cream import t_interval
from .base import COLORS, SEQUENTIAL, controls, figure
from .distraction import GREY, SYMBOLS

Rows = Sequence[Mapping[str, Any]]  # rows, means or paired of the results cream-needles and cream-64x
STYLES = {  # arm -> colour and dash, the same in all figures
    "zero-shot": (6, "solid"),
    "ordinary": (0, "solid"),
    "randpos": (3, "solid"),
    "pose": (2, "solid"),
    "cream": (1, "solid"),
    "cream-uniform": (4, "solid"),
    "cream-released": (5, "solid"),
    "continuity": (3, "dash"),
    "relativity": (5, "dash"),
}


def _style(arm: str) -> dict[str, Any]:
    at = list(STYLES).index(arm)
    color, dash = STYLES[arm]
    marker = {"symbol": SYMBOLS[at % len(SYMBOLS)], "size": 8}
    return {"mode": "lines+markers", "marker": marker, "line": {"color": COLORS[color], "dash": dash}}


def _bars(cells: Sequence[Mapping[str, Any]], axis: str = "error_y") -> dict[str, Any]:
    """Error bars from low to high (0 to 1) in percent, cut where no accuracy can be."""
    if any(c["low"] is None for c in cells):
        return {axis: {"type": "data", "array": [], "visible": False}}
    up = [round(100 * (min(1, c["high"]) - c["mean"]), 2) for c in cells]
    down = [round(100 * (c["mean"] - max(0, c["low"])), 2) for c in cells]
    bars = {"array": up, "arrayminus": down, "thickness": 1.5, "width": 4, "visible": True}
    return {axis: {"type": "data", "symmetric": False} | bars}


def _choice(fig: go.Figure, scalings: Sequence[str], update, **more) -> go.Figure:
    """Controls for `update(scaling, **more)`; a scaling that is the only one needs no control."""
    if len(scalings) > 1:
        return controls(fig, {"scaling": list(scalings), **more["values"]}, update, start=more.get("start"))
    if more["values"]:
        only = scalings[0]
        return controls(fig, more["values"], lambda **at: update(scaling=only, **at), start=more.get("start"))
    for trace, change in zip(fig.data, update(scaling=scalings[0])["data"], strict=True):
        trace.update(change)
    return fig


def by_length(means: Rows, arms: Mapping[str, str], scalings: Sequence[str], window: int) -> go.Figure:
    """Accuracy in percent by the tokens of the text, with the interval over seeds, and a choice of the scaling.

    means: of a result. arms: arm -> name in the legend; one that a scaling lacks stays out. window: tokens of a training row.
    """
    lengths = sorted({m["length"] for m in means})
    fig = figure(height=460, margin={"l": 64, "r": 16, "t": 104, "b": 56})
    for arm, name in arms.items():
        fig.add_scatter(
            name=name, **_style(arm), hovertemplate="%{customdata} tokens: %{y} %<extra>" + name + "</extra>"
        )

    def update(scaling: str) -> dict:
        data = []
        for i, arm in enumerate(arms):
            cells = sorted(
                (m for m in means if (m["arm"], m["scaling"]) == (arm, scaling)), key=lambda m: m["length"]
            )
            apart = 1.02 ** (i - (len(arms) - 1) / 2)  # bars of two arms stay apart
            x, y = [round(m["length"] * apart, 1) for m in cells], [round(100 * m["mean"], 1) for m in cells]
            data.append({"x": x, "y": y, "customdata": [f"{m['length']:,}" for m in cells], **_bars(cells)})
        return {"data": data}

    fig.update_xaxes(
        title="tokens of the text", type="log", tickvals=lengths, ticktext=[f"{n:,}" for n in lengths],
        range=[float(np.log10(lengths[0] * 0.85)), float(np.log10(lengths[-1] * 1.18))],
    )  # fmt: skip
    fig.update_yaxes(title="tokens of the needle right (%)", range=[-4, 104])
    fig.add_vline(x=window, line={"color": GREY, "dash": "dash"})
    return _choice(fig, scalings, update, values={})


def by_depth(
    rows: Rows, arms: Mapping[str, str], scalings: Sequence[str], start: Mapping | None = None
) -> go.Figure:
    """Accuracy in percent by the depth of the needle, with the interval over seeds. Controls: scaling, tokens of the text.

    rows: of a result. arms: arm -> name.
    """
    lengths = sorted({int(n) for r in rows for n in r["accuracy"]})
    fig = figure(height=440, margin={"l": 64, "r": 16, "t": 104, "b": 56})
    for arm, name in arms.items():
        fig.add_scatter(
            name=name, **_style(arm), hovertemplate="depth %{customdata} %: %{y} %<extra>" + name + "</extra>"
        )

    def update(scaling: str, tokens: int) -> dict:
        data = []
        for i, arm in enumerate(arms):
            seeds = [r["accuracy"][str(tokens)] for r in rows if (r["arm"], r["scaling"]) == (arm, scaling)]
            cells = [t_interval(at) for at in zip(*seeds, strict=True)]
            depth = [100 * d / max(1, len(cells) - 1) for d in range(len(cells))]
            x = [round(d + 0.5 * (i - (len(arms) - 1) / 2), 2) for d in depth]
            y = [round(100 * c["mean"], 1) for c in cells]
            data.append({"x": x, "y": y, "customdata": depth, **_bars(cells)})
        return {"data": data}

    fig.update_xaxes(title="depth of the needle (%)", range=[-4, 104], dtick=25)
    fig.update_yaxes(title="tokens of the needle right (%)", range=[-4, 104])
    return _choice(fig, scalings, update, values={"tokens": lengths}, start=start)


def differences(paired: Rows, names: Mapping[str, str], start: int) -> go.Figure:
    """Paired differences in points, with the interval over seeds, at all depths and at the three middle ones. A slider over the length.

    paired: of a result. names: arm -> name.
    """
    lines = list(dict.fromkeys((p["a"], p["b"], p["scaling"]) for p in paired))
    labels = [f"{names[a]} − {names[b]}<br>{scaling}" for a, b, scaling in lines]
    lengths = sorted({p["length"] for p in paired})
    fig = figure(height=140 + 52 * len(lines), margin={"l": 16, "r": 16, "t": 56, "b": 56})
    parts = {"all": "all depths", "middle": "middle third"}
    for i, name in enumerate(parts.values()):
        fig.add_scatter(
            mode="markers", name=name, marker={"symbol": SYMBOLS[i], "size": 9, "color": COLORS[i]},
            hovertemplate="%{x} points, ahead in %{customdata[0]} of %{customdata[1]} seeds<extra>" + name + "</extra>",
        )  # fmt: skip

    def update(tokens: int) -> dict:
        data = []
        for i, part in enumerate(parts):
            cells = [
                next(p for p in paired if (p["a"], p["b"], p["scaling"], p["length"], p["depths"]) == (*line, tokens, part))
                for line in lines
            ]  # fmt: skip
            half = [0 if c["low"] is None else round(100 * (c["high"] - c["mean"]), 2) for c in cells]
            data.append(
                {
                    "x": [round(100 * c["mean"], 2) for c in cells],
                    "y": [n + 0.24 * (i - 0.5) for n in range(len(lines))],
                    "error_x": {"type": "data", "array": half, "thickness": 1.5, "width": 4},
                    "customdata": [[c["wins"], c["seeds"]] for c in cells],
                }
            )
        return {"data": data}

    ends = [abs(v) for p in paired for v in (p["low"], p["high"], p["mean"]) if v is not None]
    most = 105 * max(ends, default=0.01)
    fig.update_xaxes(title="points", range=[-most, most])
    fig.update_yaxes(
        tickvals=list(range(len(lines))), ticktext=labels, range=[len(lines) - 0.5, -0.5], showgrid=False, zeroline=False
    )  # fmt: skip
    fig.add_vline(x=0, line={"color": GREY})
    return controls(fig, {"tokens": lengths}, update, start={"tokens": start})


def attention(maps: Mapping[str, np.ndarray], edges: Sequence[int]) -> go.Figure:
    """Attention weights in percent, query by key. maps: name of a choice -> [n, n], 0 to 1; edges: where runs of labels begin."""
    fig = figure(height=520, margin={"l": 56, "r": 16, "t": 24, "b": 88})
    bar = {"orientation": "h", "y": -0.2, "yanchor": "top", "thickness": 12, "ticksuffix": " %"}
    fig.add_heatmap(
        colorscale=SEQUENTIAL, zmin=0, zmax=20, colorbar=bar, hovertemplate="query %{y}, key %{x}: %{z} %<extra></extra>"
    )  # fmt: skip

    def update(call: str) -> dict:
        weights = np.asarray(maps[call])
        hidden = np.triu(np.ones_like(weights, dtype=bool), 1)
        z = [
            [None if h else round(100 * float(w), 1) for w, h in zip(*row, strict=True)]
            for row in zip(weights, hidden, strict=True)
        ]
        return {"data": [{"z": z}]}

    for edge in edges:
        fig.add_vline(x=edge - 0.5, line={"color": COLORS[1], "width": 1.5})
        fig.add_hline(y=edge - 0.5, line={"color": COLORS[1], "width": 1.5})
    fig.update_xaxes(title="key (token of the row)", showgrid=False, zeroline=False)
    fig.update_yaxes(title="query", autorange="reversed", showgrid=False, zeroline=False)
    return controls(fig, {"call": list(maps)}, update)
