"""Chapter 4: where the attention of a memory layer goes when documents share the memory, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import plotly.graph_objects as go
import torch

from .base import COLORS, SEQUENTIAL, controls, figure

GREY = "rgba(128,128,128,0.8)"
GRID = "rgba(128,128,128,0.25)"  # axes made by set_subplots do not take it from figure()
PARTS = {"window": COLORS[6], "own document": COLORS[5], "foreign documents": COLORS[4]}
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of Student's t with n - 1 degrees

Series = Mapping[str, Mapping[int, Sequence[float]]]  # name -> documents in the memory -> one value a seed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % Student interval) over 2 to 5 seeds; half width 0 for a single value."""
    if len(values) == 1:
        return values[0], 0.0
    return mean(values), STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))


def weights_map(weights: torch.Tensor, names: Sequence[str]) -> go.Figure:
    """The softmax of each query of a window as a row over all its keys, in percent. weights: [S, len(names) * S]."""
    S = len(weights)
    text = [[f"{100 * w:.0f}" if w > 0 else "" for w in row] for row in weights.tolist()]
    heat = go.Heatmap(
        z=[[round(100 * w, 1) for w in row] for row in weights.tolist()],
        text=text,
        texttemplate="%{text}",
        colorscale=SEQUENTIAL,
        zmin=0,
        xgap=1,
        ygap=1,
        showscale=False,
        hovertemplate="query %{y}, key %{x}: %{z} %<extra></extra>",
    )
    fig = figure(heat, height=300, margin={"l": 56, "r": 16, "t": 48, "b": 48})
    for i, name in enumerate(names):
        place = {"x": (i + 0.5) * S - 0.5, "y": 1, "yref": "paper", "yanchor": "bottom"}
        fig.add_annotation(**place, text=name, showarrow=False)
        if i:
            fig.add_vline(x=i * S - 0.5, line={"color": GREY, "width": 3})
    fig.update_xaxes(title="keys", showgrid=False, showticklabels=False, zeroline=False)
    fig.update_yaxes(
        title="query", autorange="reversed", showgrid=False, zeroline=False, tickvals=list(range(S))
    )
    return fig


def _documents_axis(fig: go.Figure, ticks: Sequence[int], **where) -> None:
    fig.update_xaxes(
        title="documents in the memory",
        type="log",
        tickvals=list(ticks),
        ticktext=[str(t) for t in ticks],
        **where,
    )


def _lines(series: Series, scale: float, unit: str, digits: int) -> list[go.Scatter]:
    """One line a name through the means, with the interval over seeds as bars."""
    traces = []
    for i, (name, points) in enumerate(series.items()):
        at = {d: interval(values) for d, values in points.items()}
        seeds = max(len(values) for values in points.values())
        shift = 1 + 0.015 * (seeds > 1) * (
            i - (len(series) - 1) / 2
        )  # bars of two lines at one place stay apart
        traces.append(
            go.Scatter(
                x=[round(d * shift, 4) for d in at],
                y=[round(scale * m, digits) for m, _ in at.values()],
                error_y={
                    "type": "data",
                    "array": [round(scale * half, digits) for _, half in at.values()],
                    "thickness": 1.5,
                    "width": 4,
                    "visible": seeds > 1,
                },
                name=name,
                mode="lines+markers",
                marker={"symbol": SYMBOLS[i % 4], "size": 8},
                line={"color": COLORS[i]},
                customdata=[[d, round(scale * half, digits)] for d, (_, half) in at.items()],
                hovertemplate="%{customdata[0]} documents: %{y}"
                + (" ± %{customdata[1]}" if seeds > 1 else "")
                + f" {unit}<extra>{name}</extra>",
            )
        )
    return traces


def share(series: Series, averages: Mapping[str, Series] | None = None) -> go.Figure:
    """r_d in percent against the number of documents, beside the curve 1/d (paper, figure 3).

    With several seeds a point is their mean and the bar its 95 % Student interval. averages: the same series under
    other averages, for a drop-down; `series` is then ignored but for its documents.
    """
    documents = sorted({d for points in series.values() for d in points})
    even = go.Scatter(
        x=documents,
        y=[round(100 / d, 2) for d in documents],
        name="1/d, spread evenly",
        mode="lines",
        line={"color": GREY, "dash": "dash"},
    )
    fig = figure(*_lines(series, 100, "%", 2), even, height=440, margin={"l": 64, "r": 16, "t": 72, "b": 56})
    _documents_axis(fig, documents)
    fig.update_yaxes(title="attention on the memory that<br>goes to the own document (%)", range=[-3, 104])
    if averages is None:
        return fig

    def update(average: str) -> dict:
        lines = _lines(averages[average], 100, "%", 2)
        return {
            "data": [
                {"y": t.y, "error_y": t.error_y.to_plotly_json(), "customdata": t.customdata} for t in lines
            ]
        }

    return controls(fig, {"average": list(averages)}, update)


def harm(series: Series) -> go.Figure:
    """What the memory does to the loss, in nats per token against no memory: above zero it harms.

    series: name -> documents -> loss with the memory minus loss without it, for each seed.
    """
    documents = sorted({d for points in series.values() for d in points})
    fig = figure(
        *_lines(series, 1, "nats", 4),
        height=420,
        showlegend=True,
        margin={"l": 64, "r": 16, "t": 72, "b": 56},
    )
    fig.add_hline(y=0, line={"color": GREY, "dash": "dash"})
    fig.add_annotation(
        x=0, xref="paper", y=0, yanchor="bottom", xanchor="left", text="no memory", showarrow=False
    )
    _documents_axis(fig, documents)
    fig.update_yaxes(title="loss against no memory<br>(nats per token)")
    return fig


def pile(
    masses: Mapping[str, torch.Tensor], change: Mapping[str, Mapping[int, float]], start: int = 1
) -> go.Figure:
    """Documents piled up in the memory by a slider: the attention of each model as one bar, its loss below.

    masses: model -> attention mass [..., 1 + C] with C documents in the memory. Because all share one softmax, the masses
    of a query with fewer documents are the first of these, divided by their sum. change: model -> documents -> loss
    against no memory in nats.
    """
    names, documents = list(masses), sorted(next(iter(change.values())))
    most = documents[-1]
    colors = [PARTS["window"], PARTS["own document"]]
    colors += [PARTS["foreign documents"], "#A86F00"] * (most // 2)  # light and dark, to tell documents apart
    parts = ["window", "own document", *(f"foreign document {i}" for i in range(1, most))]
    fig = figure(height=680, barmode="overlay", margin={"l": 16, "r": 16, "t": 72, "b": 56})
    fig.set_subplots(rows=2, cols=1, vertical_spacing=0.3, row_heights=[0.42, 0.58])
    fig.update_layout(legend2={"orientation": "h", "x": 0, "y": 0.42, "yanchor": "bottom"})
    for i, name in enumerate(names):
        fig.add_bar(
            y=[i] * (most + 1),
            orientation="h",
            marker={"color": colors, "line": {"width": 0}},
            width=0.7,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "black"},
            customdata=parts,
            hovertemplate=f"{name}, %{{customdata}}: %{{x}} %<extra></extra>",
            showlegend=False,
            row=1,
            col=1,
        )
    for i, name in enumerate(names):  # the marker that the slider moves
        fig.add_scatter(
            mode="markers",
            marker={
                "symbol": SYMBOLS[i],
                "size": 14,
                "color": COLORS[i],
                "line": {"width": 2, "color": GREY},
            },
            hovertemplate=f"{name}: %{{y}} nats<extra></extra>",
            showlegend=False,
            row=2,
            col=1,
        )
    for line in _lines({n: {d: [v] for d, v in change[n].items()} for n in names}, 1, "nats", 4):
        fig.add_trace(line.update(legend="legend2", marker={"size": 5}), row=2, col=1)
    for name, color in PARTS.items():
        marker = {"symbol": "square", "size": 12, "color": color}
        fig.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, row=1, col=1)

    def update(documents: int) -> dict:
        bars, markers = [], []
        for name in names:
            part = masses[name][..., : 1 + documents].flatten(0, -2).double()
            width = (100 * part / part.sum(-1, keepdim=True)).mean(0).tolist() + [0.0] * (most - documents)
            left = [sum(width[:i]) for i in range(len(width))]
            text = [f"{w:.0f} %" if w >= 8 and i < 2 else "" for i, w in enumerate(width)]
            bars.append(
                {"x": [round(w, 2) for w in width], "base": [round(b, 2) for b in left], "text": text}
            )
            markers.append({"x": [documents], "y": [round(change[name][documents], 4)]})
        return {"data": bars + markers}

    fig.update_xaxes(range=[0, 100], ticksuffix=" %", dtick=25, showgrid=False, row=1, col=1)
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        row=1,
        col=1,
    )
    ticks = [d for d in documents if d & (d - 1) == 0]
    _documents_axis(fig, ticks, row=2, col=1)
    fig.update_xaxes(gridcolor=GRID, row=2, col=1)
    fig.update_yaxes(title="loss against no memory<br>(nats per token)", gridcolor=GRID, row=2, col=1)
    fig.add_hline(y=0, line={"color": GREY, "dash": "dash"}, row=2, col=1)
    return controls(fig, {"documents": documents}, update, start={"documents": start}, play=True)
