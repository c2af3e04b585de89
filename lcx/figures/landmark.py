"""Figures of the grouped softmax: mass that flows through landmarks, who sees what, gates of a model, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch

from ..methods.landmark import grouped_softmax
from .base import COLORS, SEQUENTIAL, controls, figure

GREY = "rgba(128,128,128,0.45)"
GRID = "rgba(128,128,128,0.25)"
DASHES, SYMBOLS = ("solid", "dash", "dot"), ("circle", "square", "diamond")
HATCH = {"size": 6, "solidity": 0.3, "fillmode": "overlay", "fgcolor": "rgba(255,255,255,0.4)"}
OWN, GATE, BEHIND, IGNORED, FUTURE = (
    "token of the own block",
    "landmark of an earlier block: a gate",
    "token behind a gate",
    "landmark of the own block: ignored",
    "future: hidden",
)
MARKS = {
    OWN: ("square", COLORS[2], 12),
    GATE: ("diamond", COLORS[1], 13),
    BEHIND: ("circle", COLORS[0], 8),
    IGNORED: ("x", COLORS[3], 10),
    FUTURE: ("circle-open", GREY, 4),
}


def role(query: int, key: int, block_size: int) -> str:
    """What key number `key` is to query number `query`, one of OWN, GATE, BEHIND, IGNORED, FUTURE."""
    own = query // block_size == key // block_size
    if own and key % block_size == block_size - 1:
        return IGNORED  # for all but the landmark itself it is also the future
    if key > query:
        return FUTURE
    if own:
        return OWN
    return GATE if key % block_size == block_size - 1 else BEHIND


def names(tokens: int, block_size: int) -> list[str]:
    """Positions as labels, landmarks with an L in front: 0, 1, L2, 3, …"""
    return [f"L{j}" if j % block_size == block_size - 1 else str(j) for j in range(tokens)]


def who_sees_what(tokens: int, block_sizes: Sequence[int], start: int) -> go.Figure:
    """The role of each key (columns) for each query (rows), with a slider over the block size that begins at `start`."""

    def update(block_size: int) -> dict[str, Any]:
        labels = names(tokens, block_size)
        cells: dict[str, list[tuple[int, int]]] = {kind: [] for kind in MARKS}
        for i in range(tokens):
            for j in range(tokens):
                cells[role(i, j, block_size)].append((i, j))
        data = [
            {
                "x": [j for _, j in at],
                "y": [i for i, _ in at],
                "text": [f"query {labels[i]}, key {labels[j]}: {kind}" for i, j in at],
            }
            for kind, at in cells.items()
        ]
        ticks = {"tickvals": list(range(tokens)), "ticktext": labels}
        return {"data": data, "layout": {"xaxis": ticks, "yaxis": ticks}}

    look = {"mode": "markers", "hovertemplate": "%{text}<extra></extra>"}
    marks = [
        go.Scatter(name=kind, marker={"symbol": symbol, "color": color, "size": size}, **look)
        for kind, (symbol, color, size) in MARKS.items()
    ]
    margin = {"l": 56, "r": 16, "t": 136, "b": 56}
    fig = figure(*marks, height=600, legend={"orientation": "v"}, margin=margin)
    fig.update_xaxes(title="key", range=[-0.6, tokens - 0.4], tickfont={"size": 11}, tickangle=0)
    fig.update_yaxes(title="query", range=[tokens - 0.4, -0.6], tickfont={"size": 11})
    return controls(fig, {"block_size": list(block_sizes)}, update, start={"block_size": start})


def mass(scores: Sequence[float], query: int, block_size: int) -> tuple[list[tuple], list[tuple]]:
    """Where one query's attention goes: the segments of the main softmax and those of the weights, left to right.

    Each segment is (key, from, to). What a landmark gets in the first list is what the tokens of its block share in
    the second, so both lists cover 0 to 1, and blocks lie below their landmark.
    """
    row = torch.tensor(scores, dtype=torch.float64)[: query + 1]
    weights = grouped_softmax(row[None], block_size)[0].tolist()
    main, below, at = [], [], 0.0
    for first in range(0, query + 1, block_size):
        keys = range(first, min(first + block_size, query + 1))
        begin = at
        for j in keys:
            if role(query, j, block_size) in (OWN, BEHIND):
                below.append((j, at, at + weights[j]))
                at += weights[j]
        if query // block_size > first // block_size:
            main.append((keys[-1], begin, at))
    main += [segment for segment in below if role(query, segment[0], block_size) == OWN]
    return main, below


def flow(
    scores: Sequence[float],
    block_size: int,
    queries: Sequence[int],
    moves: Mapping[str, tuple[int, Sequence[float]]] | None = None,
    start: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Scores of one query above; below, how its attention is shared out, first by the main softmax, then to the tokens.

    moves: name of a slider -> (key, scores it can have). Without moves and with one query the figure has no controls.
    """
    moves = dict(moves or {})
    labels, colors = names(len(scores), block_size), [COLORS[j // block_size] for j in range(len(scores))]
    landmark = [name.startswith("L") for name in labels]
    MAIN, WEIGHTS = "main softmax", "weights of the tokens"

    def label(name: str, share: float) -> str:
        """What fits into a segment, on a phone too."""
        return f"{name}<br>{share:.3f}" if share > 0.14 else name if share > 0.03 else ""

    def update(query: int, **moved: float) -> dict[str, Any]:
        now = list(scores)
        for name, value in moved.items():
            now[moves[name][0]] = value
        bars = [
            (MAIN if strip == 0 else WEIGHTS, j, a, b)
            for strip, segments in enumerate(mass(now, query, block_size))
            for j, a, b in segments
        ]
        unseen = [role(query, j, block_size) in (FUTURE, IGNORED) for j in range(len(now))]
        words = {"xaxis2": {"title": {"text": f"share of the attention of query {labels[query]}"}}}
        return {
            "layout": words,
            "data": [
                {
                    "y": now,
                    "marker": {"color": [GREY if u else c for u, c in zip(unseen, colors, strict=True)]},
                },
                {
                    "y": [strip for strip, *_ in bars],
                    "base": [round(a, 4) for *_, a, _ in bars],
                    "x": [round(b - a, 4) for *_, a, b in bars],
                    "text": [label(labels[j], b - a) for _, j, a, b in bars],
                    "marker": {
                        "color": [colors[j] for _, j, *_ in bars],
                        "pattern": {"shape": ["/" if landmark[j] else "" for _, j, *_ in bars]},
                    },
                },
            ],
        }

    fig = figure(height=500, margin={"l": 56, "r": 16, "t": 24, "b": 56}, showlegend=False, bargap=0.3)
    fig.set_subplots(rows=2, cols=1, vertical_spacing=0.2, row_heights=[0.45, 0.55])
    fig.add_bar(
        x=list(range(len(scores))),
        marker={"pattern": {"shape": ["/" if is_one else "" for is_one in landmark], **HATCH}},
        texttemplate="%{y:.1f}",
        textposition="outside",
        cliponaxis=False,
        hovertemplate="score %{y}<extra></extra>",
        row=1,
        col=1,
    )
    fig.add_bar(
        orientation="h",
        marker={"line": {"color": "white", "width": 1.5}, "pattern": HATCH},
        textfont={"size": 12, "color": "white"},
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        constraintext="none",
        hovertemplate="%{x:.4f}<extra>%{y}</extra>",
        row=2,
        col=1,
    )
    all_scores = [*scores, 0.0, *(v for _, values in moves.values() for v in values)]
    low, high = min(all_scores), max(all_scores)
    room = 0.14 * (high - low)
    fig.update_xaxes(title="key (L: landmark)", tickvals=list(range(len(scores))), ticktext=labels, row=1)
    fig.update_yaxes(title="score", range=[low - 1.5 * room * (low < 0), high + room], row=1)
    fig.update_xaxes(range=[0, 1], row=2)
    fig.update_yaxes(
        categoryarray=[WEIGHTS, MAIN],
        categoryorder="array",
        showgrid=False,
        showticklabels=False,
        ticks="",
        row=2,
    )
    for i, strip in enumerate((WEIGHTS, MAIN)):
        place = {"x": 0, "xref": "paper", "xanchor": "left", "y": i + 0.36, "yref": "y2", "yanchor": "bottom"}
        fig.add_annotation(text=strip, showarrow=False, font={"size": 13}, **place)
    values = {"query": list(queries), **{name: list(choices) for name, (_, choices) in moves.items()}}
    if moves or len(queries) > 1:
        return controls(fig, values, update, start=start)
    change = update(queries[0])
    [trace.update(data) for trace, data in zip(fig.data, change["data"], strict=True)]
    return fig.update_layout(change["layout"])


def own_share(tokens_before: Sequence[int], shares: Mapping[str, Sequence[float]]) -> go.Figure:
    """What a token keeps for itself, in percent, by the number of tokens before it. shares: name -> values from 0 to 1."""
    fig = figure(height=420, margin={"l": 64, "r": 16, "t": 72, "b": 56})
    for i, (name, values) in enumerate(shares.items()):
        look = {"line": {"color": COLORS[i], "dash": DASHES[i]}, "marker": {"symbol": SYMBOLS[i], "size": 8}}
        y = [round(100 * v, 5) for v in values]
        fig.add_scatter(x=list(tokens_before), y=y, mode="lines+markers", name=name, **look)
    texts = [f"{t:,}" for t in tokens_before]
    fig.update_xaxes(title="tokens before it", type="log", tickvals=list(tokens_before), ticktext=texts)
    powers = {"tickvals": [0.01, 0.1, 1, 10, 100], "ticktext": ["0.01", "0.1", "1", "10", "100"]}
    fig.update_yaxes(title="attention it keeps (%)", type="log", range=[-2, 2.1], **powers)
    return fig


def weights_map(
    cases: Mapping[str, Sequence[Sequence[float]]], landmarks: Sequence[int], control: str = "version"
) -> go.Figure:
    """Weights of queries (rows) on keys (columns), with a switch. Rows that do not sum to 1 say so.

    cases: name -> weights. landmarks: positions where a landmark really stands; a weight there gets a cross.
    """
    size = len(next(iter(cases.values())))
    labels = [f"L{j}" if j in landmarks else str(j) for j in range(size)]

    def update(**at: str) -> dict[str, Any]:
        weights = cases[at[control]]
        wrong = [(i, j) for i in range(size) for j in landmarks if weights[i][j] > 1e-9]
        sums = [sum(row) for row in weights]
        rows = [x if abs(s - 1) < 1e-6 else f"{x}, sum {s:.2f}" for x, s in zip(labels, sums, strict=True)]
        return {
            "data": [
                {"z": [[round(w, 3) if w > 0 else None for w in row] for row in weights]},
                {"x": [j for _, j in wrong], "y": [i for i, _ in wrong]},
            ],
            "layout": {"yaxis": {"ticktext": rows}},
        }

    fig = figure(
        go.Heatmap(
            colorscale=SEQUENTIAL, zmin=0, zmax=1, xgap=2, ygap=2, hoverongaps=False,
            colorbar={"title": "weight", "thickness": 14}, hovertemplate="weight %{z}<extra></extra>",
        ),
        go.Scatter(
            mode="markers", name="weight on a landmark: its value is read", showlegend=True, hoverinfo="skip",
            marker={"symbol": "x", "size": 10, "color": COLORS[1], "line": {"color": "white", "width": 1}},
        ),
        height=480,
    )  # fmt: skip
    ticks = {"tickvals": list(range(size)), "showgrid": False, "zeroline": False, "tickfont": {"size": 11}}
    fig.update_xaxes(title="key", range=[-0.5, size - 0.5], ticktext=labels, tickangle=0, **ticks)
    fig.update_yaxes(title="query", range=[size - 0.5, -0.5], **ticks)
    return controls(fig, {control: list(cases)}, update)


def gates(
    maps: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], wanted: Sequence[int], start: str
) -> go.Figure:
    """Gates of queries (rows) on earlier blocks (columns), one head at a time. wanted: the blocks to be found, framed."""
    blocks = len(next(iter(maps.values()))[0])

    def update(head: str) -> dict[str, Any]:
        return {"data": [{"z": [[round(g, 3) for g in row] for row in maps[head]]}]}

    heat = go.Heatmap(
        y=list(rows), colorscale=SEQUENTIAL, zmin=0, zmax=1, xgap=2, ygap=2,
        colorbar={"title": "gate", "thickness": 14}, hovertemplate="%{y}, block %{x}: gate %{z}<extra></extra>",
    )  # fmt: skip
    fig = figure(heat, height=400, margin={"l": 16, "r": 16, "t": 32, "b": 56})
    for block in wanted:
        ends = {"x0": block - 0.5, "x1": block + 0.5, "y0": -0.5, "y1": len(rows) - 0.5}
        fig.add_shape(type="rect", line={"color": COLORS[1], "width": 3}, **ends)
    fig.update_xaxes(
        title="earlier block", dtick=1, range=[-0.6, blocks - 0.4], showgrid=False, zeroline=False
    )
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return controls(fig, {"head": list(maps)}, update, start={"head": start})


def cost(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Seconds and MiB by the number of tokens, one line a method. rows: {"method", "tokens", "seconds", "mib"}."""
    fig = figure(height=560, margin={"l": 64, "r": 16, "t": 96, "b": 56}, legend={"orientation": "v"})
    fig.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        mine = [r for r in rows if r["method"] == method]
        look = {"line": {"color": COLORS[i], "dash": DASHES[i]}, "marker": {"symbol": SYMBOLS[i], "size": 8}}
        for panel, key in ((1, "seconds"), (2, "mib")):
            fig.add_scatter(
                x=[r["tokens"] for r in mine], y=[float(f"{r[key]:.3g}") for r in mine], mode="lines+markers",
                name=method, legendgroup=method, showlegend=panel == 1, row=panel, col=1, **look,
            )  # fmt: skip
    ticks = sorted({r["tokens"] for r in rows})
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks], gridcolor=GRID)
    fig.update_yaxes(type="log", gridcolor=GRID, dtick=1)
    fig.update_xaxes(title="tokens", row=2)
    fig.update_yaxes(title="seconds", row=1)
    fig.update_yaxes(title="kept (MiB)", row=2)
    return fig
