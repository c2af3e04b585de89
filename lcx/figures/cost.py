"""Chapter 1: what attention costs. Every number comes from `lcx.plan` or is handed in measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10

import plotly.graph_objects as go

from .. import plan
from ..plan import DEVICES, GIB, ModelShape
from .base import COLORS, SEQUENTIAL, controls, figure

_SHOWN_DEVICES = ("T4", "A100-40", "H200")
_LOG2_TICKS = {1024: "1k", 4096: "4k", 16384: "16k", 65536: "64k", 262144: "256k", 1048576: "1M"}


def tokens(n: float) -> str:
    """A number of tokens in a few characters: 900, 53k, 1.2M."""
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k" if n >= 1e4 else f"{n:,.0f}"


def gib(n: float) -> str:
    """Bytes in a readable binary unit: 96 KiB, 720 MiB, 12.6 GiB."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if n >= 0.995 * size:
            return f"{n / size:,.{0 if n >= 100 * size else 1}f} {unit}"
    return f"{n / 1024:,.0f} KiB"


def _round(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def _length_axis(title: str) -> dict:
    return {
        "type": "log",
        "title": title,
        "tickvals": list(_LOG2_TICKS),
        "ticktext": list(_LOG2_TICKS.values()),
    }


def memory_curves(shapes: Sequence[ModelShape], dtype: str = "bfloat16") -> go.Figure:
    """KV cache (solid) and weights (dotted) in GiB against length, 1k to 1M tokens, with the memory of three GPUs."""
    lengths, traces = [1024, 2**20], []
    for color, shape in zip(COLORS, shapes, strict=False):
        cache = [_round(plan.kv_bytes(shape, t, dtype) / GIB) for t in lengths]
        weights = [_round(plan.weight_bytes(shape, dtype) / GIB)] * 2
        traces.append(
            go.Scatter(x=lengths, y=cache, name=shape.name, mode="lines", line={"color": color, "width": 3})
        )
        traces.append(
            go.Scatter(
                x=lengths,
                y=weights,
                name=f"{shape.name}, weights",
                mode="lines",
                showlegend=False,
                line={"color": color, "dash": "dot"},
            )
        )
    for name in _SHOWN_DEVICES:
        traces.append(
            go.Scatter(
                x=lengths,
                y=[_round(DEVICES[name].memory / GIB)] * 2,
                name=name,
                mode="lines+text",
                text=[name, ""],
                textposition="top right",
                showlegend=False,
                line={"color": COLORS[6], "width": 1},
            )
        )
    fig = figure(*traces, height=460, xaxis=_length_axis("tokens in the cache"))
    ticks = {0.1: "0.1", 1: "1", 10: "10", 100: "100", 1000: "1,000"}
    fig.update_yaxes(
        type="log",
        title="GiB (solid: KV cache, dotted: weights)",
        range=[-1.8, 2.9],
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    return fig


def crossover_curves(shape: ModelShape, lengths: Sequence[int]) -> go.Figure:
    """FLOPs per token of a causal prefill of `shape`, by part, against its length; a diamond where attention meets the MLP."""
    at = plan.crossover_length(shape)
    lengths = sorted({*lengths, at})
    flops = [plan.flops_prefill(shape, t) for t in lengths]
    parts = {"attention (scores and mix)": "attention", "MLP": "mlp", "q, k, v, o projections": "projections"}
    traces = [
        go.Scatter(
            x=lengths,
            y=[_round(getattr(f, part) / t / 1e9) for f, t in zip(flops, lengths, strict=True)],
            name=name,
            mode="lines",
            line={"color": color, "width": 3},
        )
        for (name, part), color in zip(parts.items(), (COLORS[1], COLORS[0], COLORS[2]), strict=True)
    ]
    meet = plan.flops_prefill(shape, at).mlp / at / 1e9
    traces.append(
        go.Scatter(
            x=[at],
            y=[_round(meet)],
            name=f"equal at {at:,} tokens",
            mode="markers",
            marker={"symbol": "diamond", "size": 13, "color": COLORS[1]},
        )
    )
    fig = figure(*traces, xaxis=_length_axis("tokens in the prompt"), margin={"t": 80})
    fig.update_yaxes(
        type="log", title="GFLOP per token", tickvals=[0.1, 1, 10, 100], ticktext=["0.1", "1", "10", "100"]
    )
    return fig


_ROWS = ("weights", "KV cache", "logits, last position", "logits, every position", "weights + cache + 1 GiB")


def memory_bars(
    shapes: Sequence[ModelShape],
    lengths: Sequence[int],
    dtypes: Sequence[str] = ("float32", "bfloat16", "int8"),
    start: Mapping | None = None,
) -> go.Figure:
    """What fills the memory, for every model, length, number of key-value heads and dtype; lines mark three GPUs."""
    by_name = {s.name: s for s in shapes}
    heads = {
        "as published": lambda s: s,
        "MHA: one per query head": lambda s: s.with_kv_heads(s.heads),
        "MQA: one for all": lambda s: s.with_kv_heads(1),
    }

    def update(model, length, dtype, **kv):
        shape = heads[kv["key-value heads"]](by_name[model])
        parts = [plan.weight_bytes(shape, dtype), plan.kv_bytes(shape, length, dtype)]
        parts += [plan.logits_bytes(shape, n, dtype) for n in (1, length)]
        parts.append(parts[0] + parts[1] + GIB)
        fits = [d for d in _SHOWN_DEVICES if parts[-1] <= DEVICES[d].memory]
        title = f"{shape.kv_heads} of {shape.heads} heads keep k, v: {plan.kv_bytes(shape, 1, dtype):,} bytes a token<br>fits: {', '.join(fits) or 'none of the three'}"
        return {
            "data": [{"x": [_round(b / GIB) for b in parts]}, {"text": [gib(b) for b in parts]}],
            "layout": {"title": {"text": title}},
        }

    rows = [r.replace(", ", ",<br>").replace(" + c", "<br>+ c") for r in _ROWS]
    fig = figure(
        go.Bar(y=rows, orientation="h", marker={"color": COLORS[:5]}, name="memory", hoverinfo="skip"),
        go.Scatter(
            x=[10**5.4] * len(rows),
            y=rows,
            mode="text",
            textposition="middle left",
            name="as text",
            hoverinfo="skip",
        ),
        height=450,
        showlegend=False,
        title={
            "font": {"size": 14},
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0.97,
            "yanchor": "top",
        },
        margin={"t": 140},
    )
    fig.update_yaxes(autorange="reversed")
    ticks = {1e-3: "0.001", 0.1: "0.1", 10: "10", 1000: "1,000"}
    fig.update_xaxes(
        type="log",
        range=[-5, 5.4],
        title="memory (GiB)",
        tickangle=0,
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    for name in _SHOWN_DEVICES:
        memory = DEVICES[name].memory / GIB
        fig.add_vline(x=memory, layer="below", line={"color": COLORS[6], "width": 1.5, "dash": "dash"})
        fig.add_annotation(
            x=log10(memory),
            y=1,
            yref="paper",
            yanchor="bottom",
            yshift=30 if name == "A100-40" else 0,  # out of its neighbours' way on a phone
            text=name,
            textangle=-90,
            showarrow=False,
            font={"size": 12},
        )
    grid = {
        "model": list(by_name),
        "length": list(lengths),
        "key-value heads": list(heads),
        "dtype": list(dtypes),
    }
    return controls(fig, grid, update, start=start)


def max_context_map(
    shapes: Sequence[ModelShape], devices: Sequence[str] = tuple(DEVICES), dtype: str = "bfloat16"
) -> go.Figure:
    """Heat map of `plan.max_context`, model by device, the number of tokens written in each cell."""
    most = [[plan.max_context(s, d, dtype) for d in devices] for s in shapes]
    heat = go.Heatmap(
        z=[[_round(log10(n), 3) if n else 0 for n in row] for row in most],
        name="tokens, as a power of ten (0: the weights do not fit)",
        x=[d.replace("-", "<br>") for d in devices],
        y=[s.name for s in shapes],
        colorscale=SEQUENTIAL,
        zmin=3,
        zmax=7,
        xgap=2,
        ygap=2,
        showscale=False,
        hoverinfo="skip",
    )
    fig = figure(heat, height=120 + 40 * len(shapes), margin={"t": 56})
    for y, row in enumerate(most):
        for x, n in enumerate(
            row
        ):  # black on the light half of the scale, white on the dark half, on any page
            color = "#000000" if n > 10**5.2 else "#FFFFFF"
            fig.add_annotation(
                x=x, y=y, text=tokens(n) if n else "no", showarrow=False, font={"color": color}
            )
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_xaxes(side="top", showgrid=False, tickangle=0)
    return fig


def prefill_times(
    lengths: Sequence[int],
    measured: Mapping[str, Sequence[Sequence[float]]],
    predicted: Mapping[str, Sequence[float]],
) -> go.Figure:
    """Measured against predicted seconds, log-log. measured: name -> for each length all repeats (seconds), drawn as
    their median with the whole range; predicted: name -> one time per length, drawn dashed."""
    traces = []
    for i, name in enumerate(measured):
        traces.append(_repeats(lengths, measured[name], f"{name}, measured", COLORS[i]))
        traces.append(
            go.Scatter(
                x=list(lengths),
                y=[_round(t) for t in predicted[name]],
                name=f"{name}, predicted",
                mode="lines",
                line={"color": COLORS[i], "dash": "dash"},
            )
        )
    ticks = [t for t in lengths if t & (t - 1) == 0] or list(lengths)
    fig = figure(*traces, height=440, margin={"t": 110})
    fig.update_xaxes(
        type="log", title="tokens in the prompt", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks]
    )
    fig.update_yaxes(type="log", title="seconds", exponentformat="none", dtick=1)
    return fig


def decode_times(
    cached: Sequence[int],
    measured: Sequence[Sequence[float]],
    fit: tuple[float, float],
    predicted: Sequence[float],
) -> go.Figure:
    """Milliseconds of one decode step against the tokens in the cache. measured: all repeats (seconds) per length;
    fit: (seconds, seconds per cached token) of a straight line; predicted: seconds from bytes and bandwidth."""
    traces = [
        _repeats(cached, [[t * 1e3 for t in r] for r in measured], "measured", COLORS[0]),
        go.Scatter(
            x=list(cached),
            y=[_round((fit[0] + fit[1] * n) * 1e3) for n in cached],
            name="straight line fitted",
            mode="lines",
            line={"color": COLORS[0], "width": 1.5},
        ),
        go.Scatter(
            x=list(cached),
            y=[_round(t * 1e3) for t in predicted],
            name="every byte once, predicted",
            mode="lines",
            line={"color": COLORS[1], "dash": "dash"},
        ),
    ]
    fig = figure(*traces, margin={"t": 90})
    fig.update_xaxes(title="tokens already in the cache", rangemode="tozero", separatethousands=True)
    fig.update_yaxes(title="milliseconds per new token", rangemode="tozero")
    return fig


def _repeats(x: Sequence[float], runs: Sequence[Sequence[float]], name: str, color: str) -> go.Scatter:
    mid = [sorted(r)[len(r) // 2] for r in runs]
    return go.Scatter(
        x=list(x),
        y=[_round(m) for m in mid],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [_round(max(r) - m, 3) for r, m in zip(runs, mid, strict=True)],
            "arrayminus": [_round(m - min(r), 3) for r, m in zip(runs, mid, strict=True)],
            "thickness": 1.2,
        },
        name=name,
        mode="markers",
        marker={"color": color, "size": 9},
    )
