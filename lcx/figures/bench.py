"""Figures of the test bench: accuracies that carry their interval, and the depth × length heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ..evaluate import wilson_interval
from .base import COLORS, SEQUENTIAL, controls, figure

GREY = "rgba(128,128,128,0.55)"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def percent(share: float) -> float:
    return round(100 * share, 1)


def _bars(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Error bars from Wilson intervals, in percent."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [percent(c["high"] - c["accuracy"]) for c in cells],
        "arrayminus": [percent(c["accuracy"] - c["low"]) for c in cells],
        "thickness": 1.5,
        "width": 5,
    }


def by_length(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    x: str = "length",
    window: int | None = None,
    xaxis: str = "prompt and answer (tokens)",
) -> go.Figure:
    """Accuracy in percent against the length of the prompt, one line a series, each point with its Wilson interval.

    series: name -> cells of `evaluate.table(rows, x)`. Lengths stand at equal distances. window: draw a line behind
    the last length that fits into the model's window of so many tokens.
    """
    every = sorted({c[x] for cells in series.values() for c in cells})
    fig = figure(height=420)
    for i, (name, cells) in enumerate(series.items()):
        cells = sorted(cells, key=lambda c: c[x])
        shift = 0.12 * (i - (len(series) - 1) / 2)  # points of two series at one length stay apart
        fig.add_scatter(
            x=[every.index(c[x]) + shift for c in cells],
            y=[percent(c["accuracy"]) for c in cells],
            error_y=_bars(cells),
            mode="lines+markers",
            name=name,
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            customdata=[
                [f"{c[x]:,}", c["hits"], c["n"], percent(c["low"]), percent(c["high"])] for c in cells
            ],
            hovertemplate="%{customdata[0]}: %{customdata[1]} of %{customdata[2]} right, "
            "95 % interval %{customdata[3]} to %{customdata[4]} %<extra>" + name + "</extra>",
        )
    ticks = {"tickvals": list(range(len(every))), "ticktext": [f"{v:,}" for v in every]}
    fig.update_xaxes(title=xaxis, **ticks, tickangle=0, tickfont={"size": 12})
    fig.update_yaxes(title="exact match (%)", range=[-4, 104])
    if window is not None:
        _window_line(fig, every, window)
    return fig


def _window_line(fig: go.Figure, lengths: Sequence[int], window: int) -> None:
    """A vertical line behind the last length that fits into the window, on an axis of equal steps."""
    inside = sum(v <= window for v in lengths)
    if 0 < inside < len(lengths):
        fig.add_vline(x=inside - 0.5, line_dash="dash", line_color=GREY)
        fig.add_annotation(
            x=inside - 0.5, y=1, yref="paper", yanchor="bottom", showarrow=False, text=f"window {window:,}"
        )


METRICS = {
    "exact match": "accuracy",
    "low end of the 95 % interval": "low",
    "digits right": "digits",
}


def heat_map(
    cells: Mapping[str, Sequence[Mapping[str, Any]]], *, window: int | None = None, height: int = 440
) -> go.Figure:
    """Depth × length, with a choice of haystack and of what the colour means. In each cell: hits / samples.

    cells: haystack -> cells of `evaluate.table(rows, "length", "depth")`. A cell that was not measured stays empty.
    """
    lengths = sorted({c["length"] for part in cells.values() for c in part})
    depths = sorted({c["depth"] for part in cells.values() for c in part})
    at = {(kind, c["length"], c["depth"]): c for kind, part in cells.items() for c in part}

    def update(haystack: str, metric: str) -> dict[str, Any]:
        grid = [[at.get((haystack, x, d)) for x in lengths] for d in depths]
        z = [[None if c is None else round(100 * c[METRICS[metric]]) for c in row] for row in grid]
        digits = metric == "digits right"
        text = [
            [
                "" if c is None else f"{v} %" if digits else f"{c['hits']}/{c['n']}"
                for c, v in zip(*pair, strict=True)
            ]
            for pair in zip(grid, z, strict=True)
        ]
        return {"data": [{"z": z, "text": text}]}

    fig = figure(
        go.Heatmap(
            x=list(range(len(lengths))),
            y=list(range(len(depths))),
            z=[[None] * len(lengths) for _ in depths],
            customdata=[[[f"{x:,}", f"{100 * d:.0f}"] for x in lengths] for d in depths],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=100,
            xgap=2,
            ygap=2,
            texttemplate="%{text}",
            textfont={"size": 13},
            hovertemplate="%{customdata[0]} tokens, depth %{customdata[1]} %: %{text}, colour %{z} %<extra></extra>",
            colorbar={"orientation": "h", "y": -0.22, "yanchor": "top", "thickness": 12, "ticksuffix": " %"},
        ),
        height=height,
        margin={"l": 64, "r": 16, "t": 32, "b": 96},
    )
    fig.update_xaxes(
        title="prompt and answer (tokens)",
        tickvals=list(range(len(lengths))),
        ticktext=[f"{v:,}" for v in lengths],
        tickangle=0,  # a phone is just wide enough for six labels of this size
        tickfont={"size": 12},
        showgrid=False,
        zeroline=False,
    )
    fig.update_yaxes(
        title="depth of the needle (%)",
        tickvals=list(range(len(depths))),
        ticktext=[f"{100 * d:.0f}" for d in depths],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    if window is not None:
        _window_line(fig, lengths, window)
    return controls(fig, {"haystack": list(cells), "metric": list(METRICS)}, update)


def intervals(rows: Sequence[tuple[str, Mapping[str, Any]]], *, height: int | None = None) -> go.Figure:
    """One row a task: its accuracy in percent as a dot, its Wilson interval as a bar. rows: (label, cell of a table)."""
    labels, cells = [label for label, _ in rows], [cell for _, cell in rows]
    fig = figure(
        go.Scatter(
            x=[percent(c["accuracy"]) for c in cells],
            y=labels,
            error_x=_bars(cells),
            mode="markers",
            marker={"size": 10, "color": COLORS[0]},
            customdata=[[c["hits"], c["n"], percent(c["low"]), percent(c["high"])] for c in cells],
            hovertemplate="%{customdata[0]} of %{customdata[1]} right, "
            "95 % interval %{customdata[2]} to %{customdata[3]} %<extra></extra>",
        ),
        height=height or 120 + 30 * len(labels),
        showlegend=False,
        margin={"l": 16, "r": 16, "t": 16, "b": 56},
    )
    fig.update_xaxes(title="exact match (%)", range=[-3, 103])
    fig.update_yaxes(autorange="reversed", tickfont={"size": 12})
    return fig


SIZES = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500)


def interval_width(shares: Sequence[int] = (100, 90, 80, 50)) -> go.Figure:
    """What n samples say: the 95 % Wilson interval around an observed share (a control, in percent) against n.

    At an n that cannot give the share exactly, the nearest number of hits is taken.
    """

    def update(observed: int) -> dict[str, Any]:
        hits = [round(observed / 100 * n) for n in SIZES]
        low, high = zip(*(wilson_interval(h, n) for h, n in zip(hits, SIZES, strict=True)), strict=True)
        seen = [percent(h / n) for h, n in zip(hits, SIZES, strict=True)]
        return {"data": [{"y": [percent(v) for v in low]}, {"y": [percent(v) for v in high]}, {"y": seen}]}

    line = {"mode": "lines", "x": list(SIZES), "y": [0] * len(SIZES)}
    fig = figure(
        go.Scatter(**line, line={"color": COLORS[0], "width": 1}, showlegend=False, name="low end"),
        go.Scatter(
            **line,
            line={"color": COLORS[0], "width": 1},
            fill="tonexty",
            fillcolor="rgba(0,114,178,0.25)",
            name="95 % interval",
        ),
        go.Scatter(
            **{**line, "mode": "lines+markers"},
            line={"color": COLORS[1]},
            marker={"size": 7},
            name="observed share",
        ),
        height=420,
    )
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    fig.update_xaxes(title="samples", type="log", tickvals=ticks, ticktext=[str(t) for t in ticks])
    fig.update_yaxes(title="share right (%)", range=[-3, 103])
    return controls(
        fig, {"observed": [f"{s} %" for s in shares]}, lambda observed: update(int(observed[:-2]))
    )


def context_use(perplexity: Sequence[Mapping[str, Any]], passkey: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Two panels over the context that the model is left with: perplexity, and passkey accuracy with its interval.

    perplexity: dicts with context (tokens) and perplexity. passkey: cells of `evaluate.table(rows, "context")`.
    """
    fig = figure(height=500, showlegend=False, margin={"l": 64, "r": 16, "t": 16, "b": 56})
    fig.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12)
    fig.add_scatter(
        x=[p["context"] for p in perplexity],
        y=[round(p["perplexity"], 2) for p in perplexity],
        mode="lines+markers",
        marker={"size": 9},
        line={"color": COLORS[0]},
        hovertemplate="%{x:,} tokens: perplexity %{y}<extra></extra>",
        row=1,
        col=1,
    )
    fig.add_scatter(
        x=[c["context"] for c in passkey],
        y=[percent(c["accuracy"]) for c in passkey],
        error_y=_bars(passkey),
        mode="lines+markers",
        marker={"size": 9, "symbol": "square"},
        line={"color": COLORS[1]},
        customdata=[[c["hits"], c["n"]] for c in passkey],
        hovertemplate="%{x:,} tokens: %{customdata[0]} of %{customdata[1]} right<extra></extra>",
        row=2,
        col=1,
    )
    ticks = [p["context"] for p in perplexity]
    fig.update_xaxes(
        type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks], gridcolor="rgba(128,128,128,0.25)"
    )
    fig.update_xaxes(title="context left to the model (tokens)", row=2, col=1)
    top = max(p["perplexity"] for p in perplexity)
    fig.update_yaxes(
        title="perplexity", range=[0, 1.15 * top], gridcolor="rgba(128,128,128,0.25)", row=1, col=1
    )
    fig.update_yaxes(
        title="passkey right (%)", range=[-4, 104], gridcolor="rgba(128,128,128,0.25)", row=2, col=1
    )
    return fig
