"""Figures of crossbatch training: who sees whom, curves of a training, the key space, and a map of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from .base import COLORS, SEQUENTIAL, controls, figure

GRID = "rgba(128,128,128,0.25)"
DASHES = ("solid", "dash", "dot", "dashdot")
LOCAL, OWN, FOREIGN = "itself, causal", "own earlier chunk (positive)", "chunk of another document (negative)"
MARKS = {LOCAL: ("square", COLORS[6]), OWN: ("circle", COLORS[2]), FOREIGN: ("x", COLORS[1])}


def who_sees_whom(cases: Mapping[str, tuple[Sequence[Sequence[int]], Sequence[str]]]) -> go.Figure:
    """Which entries of a batch (columns) each entry (rows) sees, with a switch between the cases.

    cases: name -> (contexts, -1 where there is none; labels of the entries, one letter for the document, then its chunk).
    Raises ValueError unless all cases have the same number of entries.
    """
    sizes = {len(labels) for _, labels in cases.values()}
    if len(sizes) != 1:
        raise ValueError(f"cases of {sorted(sizes)} entries: give batches of one size")
    size = sizes.pop()

    def update(batch: str) -> dict[str, Any]:
        contexts, labels = cases[batch]
        cells = {LOCAL: [(b, b) for b in range(size)], OWN: [], FOREIGN: []}
        for b, row in enumerate(contexts):
            for c in row:
                if c >= 0:
                    cells[OWN if labels[c][0] == labels[b][0] else FOREIGN].append((b, int(c)))
        data = [
            {
                "x": [c for _, c in cells[kind]],
                "y": [b for b, _ in cells[kind]],
                "text": [f"{labels[b]} sees {labels[c]}: {kind}" for b, c in cells[kind]],
            }
            for kind in MARKS
        ]
        ticks = {"tickvals": list(range(size)), "ticktext": list(labels)}
        return {"data": data, "layout": {"xaxis": ticks, "yaxis": ticks}}

    marks = [
        go.Scatter(
            mode="markers",
            name=kind,
            marker={"symbol": symbol, "color": color, "size": 11},
            hovertemplate="%{text}<extra></extra>",
        )
        for kind, (symbol, color) in MARKS.items()
    ]
    fig = figure(*marks, height=560, legend={"orientation": "v"}, margin={"l": 56, "r": 16, "t": 96, "b": 56})
    fig.update_xaxes(
        title="entry that is seen", range=[-0.6, size - 0.4], tickfont={"size": 11}, tickangle=-90
    )
    fig.update_yaxes(title="entry that looks", range=[size - 0.4, -0.6], tickfont={"size": 11})
    return controls(fig, {"batch": list(cases)}, update)


def curves(
    lines: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], *, chance: float, d: int
) -> go.Figure:
    """Loss and positive share over training steps, in two panels.

    lines: label -> one curve a seed, each a list of {"step", "loss", "r"}. chance: r of attention spread evenly.
    """
    fig = figure(height=540, margin={"l": 64, "r": 16, "t": 72, "b": 56})
    fig.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for i, (label, seeds) in enumerate(lines.items()):
        for n, curve in enumerate(seeds):
            for row, key in ((1, "loss"), (2, "r")):
                fig.add_scatter(
                    x=[p["step"] for p in curve],
                    y=[round(p[key], 4) for p in curve],
                    mode="lines",
                    name=label,
                    legendgroup=label,
                    showlegend=row == 1 and n == 0,
                    line={"color": COLORS[i], "dash": DASHES[i % 4], "width": 2},
                    hovertemplate=f"{label}, step %{{x}}: {key} %{{y}}<extra></extra>",
                    row=row,
                    col=1,
                )
    fig.add_hline(y=chance, line={"color": COLORS[6], "dash": "dot"}, row=2, col=1)
    fig.update_xaxes(gridcolor=GRID)
    fig.update_yaxes(gridcolor=GRID)
    fig.update_xaxes(title="training step", row=2, col=1)
    fig.update_yaxes(title="loss (nats per token)", row=1, col=1)
    fig.update_yaxes(title=f"positive share r, d = {d}", rangemode="tozero", row=2, col=1)
    return fig


def by_memory(
    scores: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]],
    in_memory: Sequence[int],
    metric: str = "r",
) -> go.Figure:
    """r or loss against the documents in the memory: a line through the mean of the seeds, a bar from least to most.

    scores: label -> figures of one seed each, as str(documents) -> {"r", "loss"}. metric: "r" or "loss".
    """
    fig = figure(height=440, margin={"l": 64, "r": 16, "t": 72, "b": 56})
    ticks = list(in_memory)
    if metric == "r":
        fig.add_scatter(
            x=ticks,
            y=[round(1 / d, 4) for d in ticks],
            mode="lines",
            name="1/d, spread evenly",
            line={"color": COLORS[6], "dash": "dot"},
        )
    for i, (label, seeds) in enumerate(scores.items()):
        values = [[s[str(d)][metric] for s in seeds] for d in ticks]
        mean = [sum(v) / len(v) for v in values]
        fig.add_scatter(
            x=ticks,
            y=[round(m, 4) for m in mean],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [round(max(v) - m, 4) for v, m in zip(values, mean, strict=True)],
                "arrayminus": [round(m - min(v), 4) for v, m in zip(values, mean, strict=True)],
            },
            mode="lines+markers",
            marker={"size": 9, "symbol": ("circle", "square", "diamond", "cross", "x")[i]},
            line={"color": COLORS[i], "dash": DASHES[i % 4]},
            name=label,
        )
    fig.update_xaxes(
        title="documents in the memory, d", type="log", tickvals=ticks, ticktext=list(map(str, ticks))
    )
    if metric == "r":
        fig.update_yaxes(title="positive share r", range=[0, 1.03])
    else:
        fig.update_yaxes(title="loss (nats per token)")
    return fig


def key_space(snapshots: Sequence[Mapping[str, Any]], r: Mapping[int, float]) -> go.Figure:
    """Keys in the memory and queries of document 0 in one plane, with a slider over training steps.

    snapshots: {"step", "keys" [documents, tokens, 2], "queries" [tokens, 2]} from lcx.measure.crossbatch.plane.
    r: step -> positive share, for the axis title.
    """
    points = [p for s in snapshots for doc in [*s["keys"], s["queries"]] for p in doc]
    reach = [1.05 * max(abs(p[axis]) for p in points) for axis in (0, 1)]
    by_step = {s["step"]: s for s in snapshots}

    def update(step: int) -> dict[str, Any]:
        s = by_step[step]
        own, others = s["keys"][0], [p for doc in s["keys"][1:] for p in doc]
        groups = (others, own, s["queries"])
        title = f"first direction · step {step}, r = {r[step]:.2f}"
        return {
            "data": [{"x": [p[0] for p in g], "y": [p[1] for p in g]} for g in groups],
            "layout": {"xaxis": {"title": {"text": title}}},
        }

    kinds = (
        (f"keys of {len(snapshots[0]['keys']) - 1} other documents (negatives)", "x", COLORS[1], 7),
        ("keys of the document itself (positives)", "circle", COLORS[2], 9),
        ("queries of the document", "diamond-open", COLORS[0], 9),
    )
    marks = [
        go.Scatter(mode="markers", name=name, marker={"symbol": symbol, "color": color, "size": size})
        for name, symbol, color, size in kinds
    ]
    fig = figure(*marks, height=560, legend={"orientation": "v"}, margin={"l": 64, "r": 16, "t": 96, "b": 56})
    fig.update_traces(hoverinfo="skip")
    fig.update_xaxes(range=[-reach[0], reach[0]])
    fig.update_yaxes(title="second direction", range=[-reach[1], reach[1]])
    return controls(fig, {"step": [s["step"] for s in snapshots]}, update, play=True)


def gradient_map(maps: Mapping[str, Sequence[Sequence[float]]], labels: Sequence[str]) -> go.Figure:
    """How strongly the loss of each entry (rows) depends on the tokens of each entry (columns), with a switch.

    maps: name -> norms of the gradients, one row an entry. Exact zeros stay empty. An own later chunk that is not zero
    is a leak and gets a cross.
    """
    from math import log10

    size = len(labels)
    logs = [log10(v) for m in maps.values() for row in m for v in row if v > 0]

    def update(contexts: str) -> dict[str, Any]:
        m = maps[contexts]
        leaks = [
            (b, c)
            for b in range(size)
            for c in range(b + 1, size)
            if labels[b][0] == labels[c][0] and m[b][c] > 0
        ]
        return {
            "data": [
                {"z": [[round(log10(v), 2) if v > 0 else None for v in row] for row in m]},
                {"x": [c for _, c in leaks], "y": [b for b, _ in leaks]},
            ]
        }

    ticks = {"tickvals": list(range(size)), "ticktext": list(labels), "showgrid": False, "zeroline": False}
    low, high = int(min(logs)) - 1, int(max(logs)) + 1
    powers = list(range(low, high + 1))
    fig = figure(
        go.Heatmap(
            colorscale=SEQUENTIAL,
            zmin=min(logs),
            zmax=max(logs),
            xgap=2,
            ygap=2,
            hoverongaps=False,
            colorbar={"title": "gradient", "tickvals": powers, "ticktext": [f"{10.0**p:g}" for p in powers]},
            hovertemplate="log10 of the gradient: %{z}<extra></extra>",
        ),
        go.Scatter(
            mode="markers",
            name="leak: the document's own future",
            marker={"symbol": "x", "size": 12, "color": COLORS[1], "line": {"color": "white", "width": 1}},
            hovertemplate="a leak<extra></extra>",
            showlegend=True,
        ),
        height=460,
    )
    fig.update_xaxes(title="tokens of entry", range=[-0.5, size - 0.5], **ticks)
    fig.update_yaxes(title="loss of entry", range=[size - 0.5, -0.5], **ticks)
    return controls(fig, {"contexts": list(maps)}, update)
