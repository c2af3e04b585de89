"""Figures about positions: the turning pairs of RoPE, the angles a window has shown, and perplexity past its edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import torch

from ..methods.rope import rope_cos_sin, unseen_angle, wavelengths
from .base import COLORS, SEQUENTIAL, controls, figure

SEEN, UNSEEN, GREY = COLORS[0], COLORS[1], "rgba(128,128,128,0.45)"


def unrolled(
    frequencies: torch.Tensor, window: int, length: int, pairs: Sequence[int], points: int = 240
) -> go.Figure:
    """The cosine of the angle of some `pairs` against the distance: solid up to the training `window`, dotted past it.

    frequencies: [D/2] in radians a token. length: largest distance drawn, in tokens.
    """
    fig = figure(height=440)
    waves = wavelengths(frequencies)
    x = torch.linspace(0, length, 2 * points).round()
    wave = rope_cos_sin(x, frequencies)[0].T  # [D/2, points]
    never = unseen_angle(x, frequencies, window) > 0
    styles = (
        ("in the window", lambda j: x < window, {"color": SEEN, "width": 3}),
        (
            "past it, an angle met before",
            lambda j: (x >= window) & ~never[j],
            {"color": SEEN, "width": 2, "dash": "dot"},
        ),
        (
            "past it, an angle never met",
            lambda j: (x >= window) & never[j],
            {"color": UNSEEN, "width": 2, "dash": "dot"},
        ),
    )
    for name, where, line in styles:
        for row, j in enumerate(pairs):
            y = 0.42 * wave[j] + (len(pairs) - 1 - row)
            fig.add_scatter(
                x=x.int().tolist(),
                y=[round(v, 3) if w else None for v, w in zip(y.tolist(), where(j).tolist(), strict=True)],
                mode="lines",
                line=line,
                name=name,
                legendgroup=name,
                showlegend=row == 0,
                hovertemplate=f"pair {j}, distance %{{x:,}}<extra></extra>",
            )
    fig.add_vline(
        x=window,
        line_dash="dash",
        line_color=GREY,
        annotation_text=f"window {window:,}",
        annotation_position="bottom right",
    )
    fig.update_xaxes(title="distance (tokens)", range=[0, length])
    fig.update_yaxes(
        title="cosine of the angle",
        range=[-0.6, len(pairs) - 0.4],
        tickvals=list(range(len(pairs)))[::-1],
        ticktext=[f"pair {j}<br>{waves[j].item():,.0f} tokens" for j in pairs],
        showgrid=False,
        zeroline=False,
    )
    return fig


def phasors(
    frequencies: torch.Tensor, window: int, pairs: Sequence[int], distances: Sequence[int]
) -> go.Figure:
    """Some pairs as hands of a clock, the slowest on the outer ring, with a slider for the distance.

    The thick part of a ring is the arc that a training `window` has shown; a hand outside of it is drawn in orange.
    """
    chosen = frequencies[list(pairs)]
    waves = wavelengths(chosen)
    radius = [r + 2 for r in range(len(pairs))]
    fig = figure(height=480, showlegend=False, margin={"l": 24, "r": 24, "t": 56, "b": 24})
    for r, f in zip(radius, chosen.tolist(), strict=True):
        for turn, width, colour in ((2 * np.pi, 1, GREY), (min(2 * np.pi, (window - 1) * f), 6, SEEN)):
            arc = np.linspace(0, turn, 2 + int(72 * turn / (2 * np.pi)))
            fig.add_scatter(
                x=np.round(r * np.cos(arc), 2).tolist(),
                y=np.round(r * np.sin(arc), 2).tolist(),
                mode="lines",
                line={"color": colour, "width": width},
                opacity=1 if width == 1 else 0.6,
                hoverinfo="skip",
            )
    fig.add_scatter(x=[], y=[], mode="markers", marker={"size": 14})
    # The frames change the hands alone, so the hands must be the first trace.
    fig.data = (fig.data[-1], *fig.data[:-1])

    def update(distance: int) -> Mapping:
        angle = distance * chosen.double().numpy()
        unseen = unseen_angle(torch.tensor([distance]), chosen, window)[:, 0].numpy()
        state = [f"{np.degrees(u):.0f} degrees past the seen arc" if u > 0 else "seen" for u in unseen]
        hands = {
            "x": np.round(radius * np.cos(angle), 3).tolist(),
            "y": np.round(radius * np.sin(angle), 3).tolist(),
            "marker": {
                "color": [UNSEEN if u > 0 else SEEN for u in unseen],
                "symbol": ["x" if u > 0 else "circle" for u in unseen],
                "size": 14,
            },
            "text": [
                f"pair {j}, a turn in {w:,.0f} tokens: {s}"
                for j, w, s in zip(pairs, waves.tolist(), state, strict=True)
            ],
            "hovertemplate": "%{text}<extra></extra>",
        }
        text = f"distance {distance:,}: {int((unseen > 0).sum())} of {len(pairs)} hands stand<br>where training never put them"
        return {"data": [hands], "layout": {"title": {"text": text, "font": {"size": 14}}}}

    fig.update_xaxes(visible=False, range=[-radius[-1] - 0.6, radius[-1] + 0.6])
    fig.update_yaxes(visible=False, scaleanchor="x", range=[-radius[-1] - 0.6, radius[-1] + 0.6])
    return controls(fig, {"distance": list(distances)}, update, play=True)


def seen_map(
    frequencies: torch.Tensor, window: int, lengths: Sequence[int], *, start: int, columns: int = 96
) -> go.Figure:
    """Heat map of pair × distance: how far each angle lies outside of the arc seen in training; slider for the length."""
    waves = [f"{w:,.0f}" for w in wavelengths(frequencies).tolist()]
    fig = figure(
        go.Heatmap(
            z=[[0]],
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=180,
            colorbar={
                "title": {"text": "degrees"},
                "thickness": 12,
                "tickvals": [0, 45, 90, 135, 180],
            },
            hovertemplate="pair %{y}, distance %{x:,}: %{z} degrees from any seen angle<extra></extra>",
        ),
        height=440,
    )

    def update(length: int) -> Mapping:
        x = torch.linspace(0, length - 1, columns).round().long()
        gap = torch.rad2deg(unseen_angle(x, frequencies, window)).round().int()
        share = (gap > 0).any(0).double().mean().item()
        text = (
            f"text of {length:,} tokens: {share:.0%} of the distances<br>hold at least one angle never seen"
        )
        line = {"type": "line", "x0": window, "x1": window, "y0": 0, "y1": 1, "yref": "paper"}
        line |= {"line": {"color": UNSEEN, "dash": "dash", "width": 2}}
        return {
            "data": [{"x": x.tolist(), "z": gap.tolist()}],
            "layout": {
                "title": {"text": text, "font": {"size": 14}},
                "shapes": [line] if length > window else [],
            },
        }

    step = max(1, len(frequencies) // 8)
    fig.update_xaxes(title="distance (tokens)", showgrid=False)
    fig.update_yaxes(
        title="pair (wavelength in tokens)",
        tickvals=list(range(0, len(waves), step)),
        ticktext=[f"{j} ({waves[j]})" for j in range(0, len(waves), step)],
        showgrid=False,
    )
    return controls(fig, {"length": list(lengths)}, update, start={"length": start})


def edge(
    width: int,
    window: int,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    title: str = "perplexity",
) -> go.Figure:
    """Curves by position with their intervals, on a logarithmic axis, and the training window as a line.

    curves: name -> (value, low, high), each one number a bin of `width` positions; drawn at the middles of the bins.
    """
    fig = figure(height=440)
    for i, (name, (value, low, high)) in enumerate(curves.items()):
        colour, dash = COLORS[i], ("solid", "dash", "dot", "dashdot")[i % 4]
        x = [round((b + 0.5) * width) for b in range(len(value))]
        value, low, high = ([float(f"{v:.4g}") for v in t] for t in (value, low, high))
        rgb = ",".join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))
        fig.add_scatter(
            x=[*x, *x[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=f"rgba({rgb},0.22)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
        fig.add_scatter(
            x=x,
            y=value,
            customdata=list(zip(low, high, strict=True)),
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"size": 5},
            hovertemplate=f"{name}<br>position %{{x:,}}: %{{y:.3g}}, 95 % interval %{{customdata[0]:.3g}} to %{{customdata[1]:.3g}}<extra></extra>",
        )
    span = width * max(len(value) for value, _, _ in curves.values())
    side = "right" if window < span / 2 else "left"
    fig.add_vline(
        x=window,
        line_dash="dash",
        line_color=GREY,
        annotation_text=f"window {window:,}",
        annotation_position=f"top {side}",
    )
    ends = [v for _, low, high in curves.values() for v in (*map(float, low), *map(float, high))]
    marks = (1, 2, 5) if max(ends) > 10 * min(ends) else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [round(m * 10.0**e, 4) for e in range(-2, 6) for m in marks]
    fig.update_xaxes(title="position in the text (tokens)", rangemode="tozero")
    fig.update_yaxes(title=title, type="log", tickvals=ticks, ticktext=[f"{t:,g}" for t in ticks])
    return fig
