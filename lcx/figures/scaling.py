"""Chapter 9: how much each RoPE scaling slows each pair, what the model is then shown, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import torch

from ..methods.reach import beyond, scaled, score_by_distance
from ..methods.rope import rope_frequencies, wavelengths
from ..methods.selfextend import selfextend_distances
from .base import COLORS, controls, figure
from .distraction import GREY, GRID, SYMBOLS

NAMES = {
    "none": "no scaling",
    "linear": "linear",
    "ntk": "NTK",
    "yarn": "YaRN",
    "yarn_harmonic": "YaRN, harmonic",
}
COLOR = dict(zip(("linear", "ntk", "yarn", "yarn_harmonic", "none"), (*COLORS[:4], COLORS[6]), strict=True))
SEEN, UNSEEN = COLORS[0], COLORS[1]


def divisions(
    models: Mapping[str, Mapping], factors: Sequence[int], *, start: Mapping | None = None
) -> go.Figure:
    """By how much each method slows each pair. models: name -> window, rope_theta, head_dim. Controls: model and factor."""
    methods = ("linear", "ntk", "yarn", "yarn_harmonic")
    fig = figure(height=440, margin={"l": 56, "r": 16, "t": 88, "b": 72})
    for i, method in enumerate(methods):
        fig.add_scatter(
            mode="lines+markers", name=NAMES[method], line={"color": COLOR[method], "width": 2},
            marker={"symbol": SYMBOLS[i], "size": 6},
            hovertemplate="pair %{x}, a turn in %{customdata} tokens: %{y} times slower<extra>" + NAMES[method] + "</extra>",
        )  # fmt: skip

    def update(model: str, factor: int) -> dict:
        sizes = models[model]
        before = rope_frequencies(sizes["head_dim"], sizes["rope_theta"])
        waves = [f"{w:,.0f}" for w in wavelengths(before).tolist()]
        first = int((wavelengths(before) > sizes["window"]).nonzero()[0, 0])
        data = []
        for method in methods:
            slower = (before / scaled(method, factor, **sizes)[0]).tolist()
            data.append(
                {"x": list(range(len(slower))), "y": [round(s, 2) for s in slower], "customdata": waves}
            )
        line = {"type": "line", "x0": first - 0.5, "x1": first - 0.5, "y0": 0, "y1": 1, "yref": "paper"}
        words = f"pair, fast to slow<br>from pair {first} on: no full turn in {sizes['window']:,} tokens"
        return {
            "data": data,
            "layout": {
                "xaxis": {
                    "title": {"text": words, "font": {"size": 13}},
                    "range": [-0.5, len(before) - 0.5],
                },
                "yaxis": {"range": [-0.06 * math.log10(factor), 1.06 * math.log10(factor)]},
                "shapes": [line | {"line": {"color": GREY, "dash": "dash", "width": 2}}],
            },
        }

    ticks = [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    fig.update_yaxes(
        title="times slower", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks], zeroline=False
    )
    return controls(fig, {"model": list(models), "factor": list(factors)}, update, start=start)


def clocks(
    pairs: Sequence[int], factors: Sequence[int], distances: Sequence[int], *, window: int, rope_theta: float,
    head_dim: int, start: Mapping | None = None,
) -> go.Figure:  # fmt: skip
    """Pairs as hands of a clock, the slowest outside, stretched by a method. Controls: method, factor, distance.

    The thick part of a ring is the arc that training with `window` tokens has shown; a hand outside of it is an
    orange cross. The small open circles stand where the hands of the unscaled model would be.
    """
    sizes = {"window": window, "rope_theta": rope_theta, "head_dim": head_dim}
    before = rope_frequencies(head_dim, rope_theta)
    chosen = before[list(pairs)]
    radius = np.arange(len(pairs)) + 2.0
    fig = figure(height=480, showlegend=False, margin={"l": 16, "r": 16, "t": 56, "b": 16})
    fig.add_scatter(mode="markers", marker={"size": 14}, hovertemplate="%{text}<extra></extra>")
    open_circle = {"size": 9, "symbol": "circle-open", "color": COLORS[6]}
    fig.add_scatter(mode="markers", marker=open_circle, hoverinfo="skip")
    for r, f in zip(radius, chosen.tolist(), strict=True):
        for turn, width, color in ((2 * np.pi, 1, GREY), (min(2 * np.pi, (window - 1) * f), 6, SEEN)):
            arc = np.linspace(0, turn, 2 + int(72 * turn / (2 * np.pi)))
            fig.add_scatter(
                x=np.round(r * np.cos(arc), 2).tolist(), y=np.round(r * np.sin(arc), 2).tolist(), mode="lines",
                line={"color": color, "width": width}, opacity=1 if width == 1 else 0.6, hoverinfo="skip",
            )  # fmt: skip
    methods = {NAMES[m]: m for m in ("none", "linear", "ntk", "yarn")}

    def points(angle) -> dict:
        return {
            "x": np.round(radius * np.cos(angle), 2).tolist(),
            "y": np.round(radius * np.sin(angle), 2).tolist(),
        }

    def update(method: str, factor: int, distance: int) -> dict:
        now = scaled(methods[method], factor, **sizes)[0]
        gap = beyond(torch.tensor([distance]), before, now, window)[:, 0]
        off = (gap[list(pairs)] > 1e-6).tolist()
        slower = (before / now)[list(pairs)].tolist()
        hands = {
            **points(distance * now[list(pairs)].numpy()),
            "marker": {
                "color": [UNSEEN if u else SEEN for u in off],
                "symbol": ["x" if u else "circle" for u in off],
            },
            "text": [f"pair {j}, {s:.2f} times slower" for j, s in zip(pairs, slower, strict=True)],
        }
        text = (
            f"distance {distance:,}: {int((gap > 1e-6).sum())} of all {len(before)} pairs<br>are at an angle training "
            "never showed"
        )
        return {
            "data": [hands, points(distance * chosen.numpy())],
            "layout": {"title": {"text": text, "font": {"size": 14}}},
        }

    edge = radius[-1] + 0.6
    fig.update_xaxes(visible=False, range=[-edge, edge])
    fig.update_yaxes(visible=False, scaleanchor="x", range=[-edge, edge])
    values = {"method": list(methods), "factor": list(factors), "distance": list(distances)}
    return controls(fig, values, update, start=start)


def scores(
    heads: Mapping[str, tuple[torch.Tensor, torch.Tensor]], factors: Sequence[int], near: int, far: int, *,
    window: int, rope_theta: float, head_dim: int, start: Mapping | None = None,
) -> go.Figure:  # fmt: skip
    """The score of one query and key against the distance between them, near above and far below, scaled and not.

    heads: name -> (q, k), each [head_dim], before RoPE. near, far: largest distances. Controls: head, method, factor.
    """
    sizes = {"window": window, "rope_theta": rope_theta, "head_dim": head_dim}
    at = [torch.arange(near + 1), torch.linspace(0, far, 129).round().long()]
    fig = figure(height=580, margin={"l": 56, "r": 16, "t": 56, "b": 88})
    for name, color, width in (("scaled", SEEN, 2.5), ("no scaling", COLORS[6], 1.5)):
        for i, x in enumerate(at):
            fig.add_scatter(
                x=x.tolist(), mode="lines+markers" if i == 0 else "lines", name=name, showlegend=i == 0,
                legendgroup=name, line={"color": color, "width": width}, marker={"size": 5}, yaxis=("y", "y2")[i],
                xaxis=("x", "x2")[i], hovertemplate="distance %{x}: %{y}<extra>" + name + "</extra>",
            )  # fmt: skip
    methods = {NAMES[m]: m for m in ("linear", "ntk", "yarn")}

    def update(head: str, method: str, factor: int) -> dict:
        q, k = heads[head]
        ways = (
            scaled(methods[method], factor, **sizes),
            (rope_frequencies(head_dim, rope_theta), 1.0),
        )
        drawn = [score_by_distance(q, k, x, *way) for way in ways for x in at]
        best = [int(drawn[i].argmax()) for i in (0, 2)]
        words = f"highest score up to {near}: at distance {best[0]}<br>(without scaling at {best[1]})"
        return {
            "data": [{"y": [round(v, 2) for v in y.tolist()]} for y in drawn],
            "layout": {"title": {"text": words, "font": {"size": 14}, "y": 0.97}},
        }

    fig.update_layout(
        xaxis={"anchor": "y"}, yaxis={"domain": [0.6, 1], "title": "score, near"},
        xaxis2={"anchor": "y2", "title": "distance (tokens)"}, yaxis2={"domain": [0, 0.48], "title": "score, far"},
        legend={"y": -0.15, "yanchor": "top"},
        shapes=[{"type": "line", "xref": "x2", "yref": "y2 domain", "x0": window, "x1": window, "y0": 0, "y1": 1,
                 "line": {"color": GREY, "dash": "dash", "width": 2}}],
    )  # fmt: skip
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GREY)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=GREY)
    values = {"head": list(heads), "method": list(methods), "factor": list(factors)}
    return controls(fig, values, update, start=start)


def by_factor(
    curves: Mapping[int, Mapping[str, Mapping[int, float]]], *, window: int, xaxis: str, yaxis: str,
    start: int, ticks: Sequence[float] | None = None,
) -> go.Figure:  # fmt: skip
    """Curves of several methods, with a slider if there are several factors. curves: factor -> name -> x -> y.

    ticks: marks of a logarithmic y axis; without them y is drawn from 0 to 100 over a logarithmic x axis.
    """
    names = list(dict.fromkeys(name for of in curves.values() for name in of))
    fig = figure(height=460, margin={"l": 56, "r": 16, "t": 112, "b": 56})
    palette = (COLORS[6], *COLORS[:6])
    for i, name in enumerate(names):
        fig.add_scatter(
            mode="lines+markers", name=name, line={"color": palette[i], "dash": "dot" if i == 0 else "solid"},
            marker={"symbol": SYMBOLS[i % 4], "size": 7}, hovertemplate="%{x:,}: %{y}<extra>" + name + "</extra>",
        )  # fmt: skip

    def update(factor: int) -> dict:
        lines = [curves[factor].get(name, {}) for name in names]
        return {
            "data": [
                {"x": list(points), "y": [round(float(v), 2) for v in points.values()]} for points in lines
            ]
        }

    xs = sorted({x for of in curves.values() for points in of.values() for x in points})
    if ticks:
        fig.update_yaxes(type="log", tickvals=list(ticks), ticktext=[f"{t:g}" for t in ticks])
        fig.update_xaxes(range=[0, 1.02 * xs[-1]])
    else:
        fig.update_yaxes(range=[-4, 104])
        fig.update_xaxes(type="log", tickvals=xs, ticktext=[f"{x:,}" for x in xs])
    fig.add_vline(x=window, line={"color": GREY, "dash": "dash"})
    fig.update_xaxes(title=xaxis)
    fig.update_yaxes(title=yaxis)
    if len(curves) == 1:
        for trace, change in zip(fig.data, update(start)["data"], strict=True):
            trace.update(change)
        return fig
    return controls(fig, {"factor": list(curves)}, update, start={"factor": start})


def pair_costs(costs: Mapping[str, Sequence[float]], yaxis: str) -> go.Figure:
    """Bars: what slowing a single pair costs. costs: name -> one value a pair, fast to slow."""
    fig = figure(height=380, barmode="group", bargap=0.25)
    for i, (name, values) in enumerate(costs.items()):
        fig.add_bar(
            x=list(range(len(values))), y=[round(v, 2) for v in values], name=name, marker_color=COLORS[i],
            hovertemplate="pair %{x}: %{y}<extra>" + name + "</extra>",
        )  # fmt: skip
    fig.update_xaxes(title="pair that is slowed, fast to slow", dtick=2)
    fig.update_yaxes(title=yaxis)
    return fig


def reach_edge(points: Mapping[str, tuple[float, float]]) -> go.Figure:
    """Measured edge against computed reach, both in tokens, with the diagonal. points: label -> (reach, edge)."""
    x, y = zip(*points.values(), strict=True)
    top = 1.12 * max(*x, *y)
    fig = figure(height=420, showlegend=False)
    fig.add_scatter(
        x=[0, top], y=[0, top], mode="lines", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    fig.add_scatter(
        x=list(x), y=[round(v) for v in y], mode="markers+text", text=list(points), textposition="top center",
        marker={"size": 10, "color": COLORS[0]}, hovertemplate="%{text}: reach %{x:,}, edge %{y:,}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(title="reach: first unseen angle (tokens)", range=[0, top])
    fig.update_yaxes(title="edge: perplexity 20 % up (tokens)", range=[0, top])
    return fig


def shown_distances(
    groups: Sequence[int],
    neighbors: Sequence[int],
    longest: int,
    window: int,
    *,
    start: Mapping | None = None,
) -> go.Figure:
    """SelfExtend: the distance the model is shown against the true one. Controls: group_size and neighbor_window."""
    x = torch.linspace(0, longest - 1, 193).round().long()
    fig = figure(
        height=440, margin={"l": 56, "r": 16, "t": 56, "b": 92}, legend={"y": -0.2, "yanchor": "top"}
    )
    fig.add_scatter(x=x.tolist(), mode="lines", name="SelfExtend", line={"color": COLORS[0], "width": 2.5})
    fig.add_scatter(
        x=[0, longest], y=[0, longest], mode="lines", name="true distance", line={"color": COLORS[6], "dash": "dot"}
    )  # fmt: skip

    def update(group_size: int, neighbor_window: int) -> dict:
        # the query at the end of the text; keys at x tokens before it
        last = torch.tensor([longest - 1])
        shown = selfextend_distances(last, last - x, group_size, neighbor_window)[0]
        most = int(shown.max())
        words = f"largest distance shown: {most:,}<br>" + (
            "inside the window" if most < window else "outside of the window"
        )
        return {"data": [{"y": shown.tolist()}], "layout": {"title": {"text": words, "font": {"size": 14}}}}

    fig.add_hline(y=window - 1, line={"color": GREY, "dash": "dash"})
    fig.update_xaxes(title="true distance (tokens)", range=[0, longest])
    fig.update_yaxes(title="distance shown", range=[0, 2 * window])
    values = {"group_size": list(groups), "neighbor_window": list(neighbors)}
    return controls(fig, values, update, start=start)
