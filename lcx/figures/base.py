"""How every figure of the book starts, and how it is given controls that need no kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's colours, told apart by colour-blind readers; the black is left out, it vanishes on a dark page.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
SEQUENTIAL = "Viridis"


def figure(*traces: Any, height: int = 420, **layout: Any) -> go.Figure:
    """A go.Figure in the book's look. `layout` is passed to `update_layout`.

    Colours of text, grid and background are left to the place that shows it (light or dark page).
    """
    fig = go.Figure(data=list(traces))
    fig.update_layout(
        template="none",
        height=height,
        colorway=COLORS,
        margin={"l": 64, "r": 16, "t": 48, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
    fig.update_layout(**layout)
    fig.update_xaxes(
        gridcolor="rgba(128,128,128,0.25)", zerolinecolor="rgba(128,128,128,0.4)", automargin=True
    )
    fig.update_yaxes(
        gridcolor="rgba(128,128,128,0.25)", zerolinecolor="rgba(128,128,128,0.4)", automargin=True
    )
    return fig


def controls(
    fig: go.Figure,
    values: Mapping[str, Sequence[Any]],
    update: Callable[..., Mapping[str, Any]],
    *,
    start: Mapping[str, Any] | None = None,
    play: bool = False,
) -> go.Figure:
    """Give `fig` controls whose every combination is computed now, so that they move without a kernel.

    values: control name -> its values, for example {"length": [1024, 2048], "dtype": ["fp32", "bf16"]}. A list of
        numbers becomes a slider, a list of texts a drop-down.
    update: called as `update(**{name: value})` for each combination; returns {"data": [changed trace properties,
        one dict a trace], "layout": {...}} (either may be missing). An entry of "data" holds only what changes, as in {"y": [...]}.
    start: the combination shown first (default: the first value of each).
    play: add a play button that walks through the first control.

    Raises ValueError when a control has no value or there are more than 2,000 combinations.
    """
    names = list(values)
    grid = list(itertools.product(*(range(len(values[n])) for n in names)))
    if not grid or len(grid) > 2000:
        raise ValueError(f"controls need between 1 and 2000 combinations, got {len(grid)}: use fewer values")
    start = {n: list(values[n]).index((start or {}).get(n, values[n][0])) for n in names}
    frames = []
    for at in grid:
        change = update(**{n: values[n][i] for n, i in zip(names, at, strict=True)})
        data = [{"type": fig.data[i].type, **d} for i, d in enumerate(change.get("data", []))]
        frames.append(
            go.Frame(
                name=".".join(map(str, at)),
                data=data,
                traces=list(range(len(data))),
                layout=change.get("layout"),
            )
        )
    fig.frames = frames
    first = frames[grid.index(tuple(start[n] for n in names))]
    for trace, change in zip(fig.data, first.data, strict=False):
        trace.update({k: v for k, v in change.to_plotly_json().items() if k != "type"})
    if first.layout:
        fig.update_layout(first.layout.to_plotly_json())
    meta = dict(fig.layout.meta or {})
    meta["controls"] = [
        {
            "name": n,
            "values": [_label(v) for v in values[n]],
            "start": start[n],
            "kind": "slider" if all(isinstance(v, int | float) for v in values[n]) else "choice",
        }
        for n in names
    ]
    meta["play"] = play
    fig.update_layout(meta=meta)
    if len(names) == 1:  # Plotly's own slider, for a notebook; the built page replaces it by HTML
        _native_slider(fig, names[0], meta["controls"][0], play)
    return fig


def _label(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _native_slider(fig: go.Figure, name: str, control: Mapping[str, Any], play: bool) -> None:
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [
        {"label": label, "method": "animate", "args": [[str(i)], now]}
        for i, label in enumerate(control["values"])
    ]
    fig.update_layout(
        sliders=[
            {
                "active": control["start"],
                "steps": steps,
                "currentvalue": {"prefix": f"{name}: "},
                "pad": {"t": 48},
            }
        ]
    )
    if play:
        run = {"frame": {"duration": 500, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True}
        buttons = [
            {"label": "Play", "method": "animate", "args": [None, run]},
            {"label": "Pause", "method": "animate", "args": [[None], now]},
        ]
        fig.update_layout(
            updatemenus=[
                {
                    "type": "buttons",
                    "direction": "left",
                    "showactive": False,
                    "x": 0,
                    "y": -0.2,
                    "buttons": buttons,
                }
            ]
        )
