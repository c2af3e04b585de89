"""Chapter 6: where the tokens of a long input are, what a memory of growing size finds, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import plotly.graph_objects as go
import torch

from .base import COLORS, controls, figure
from .distraction import GREY, GRID, SYMBOLS, interval

PLACES = {"in the memory": COLORS[0], "local, read earlier": COLORS[4], "being read": COLORS[1]}


@dataclass(frozen=True)
class Step:
    """One call of the decoder: which tokens it reads, and where all earlier ones are at that moment.

    new, local, memory: token numbers. positions, other_positions: token -> position of its key, in the layer with the
    memory and in the layers without one.
    """

    new: list[int]
    local: list[int]
    memory: list[int]
    positions: dict[int, int]
    other_positions: dict[int, int]


@torch.no_grad()
def trace(model, tokens: int, prompt: int, **settings) -> list[Step]:
    """Run `tokens` different tokens through FocusedAttention, `prompt` of them at once, then one by one, and watch.

    Layer 0 has the memory: its keys depend on nothing but their token, so that every key that is stored anywhere can
    be told by comparing it with those of all tokens. settings: window, last_context, overflow, …
    """
    from ..attention import project
    from ..focused import FocusedAttention

    layer, ids = model.model.layers[0], torch.arange(tokens)[None]
    table = project(layer.self_attn, layer.input_layernorm(model.model.embed_tokens(ids)))[1]

    def which(keys: torch.Tensor) -> list[int]:
        """Token numbers of keys [1, Hkv, n, D]."""
        flat, every = (k[0].transpose(0, 1).flatten(1) for k in (keys, table))
        return torch.cdist(flat, every).argmin(1).tolist()

    steps: list[Step] = []
    others: dict[int, int] = {}

    def watch(_module, _args, call):
        job, cache, new = call["focused"], call["past_key_values"], call["input_ids"][0].tolist()
        others.update(zip(new, call["position_ids"][0].tolist(), strict=True))
        kept = table[:, :, :0] if cache is None or not len(cache.layers) else cache.layers[0].keys
        seen = which(kept)
        local = [t for t, real in zip(seen, job.mask[0, : len(seen)].tolist(), strict=True) if real]
        memory = [t for part in job.memory.segments for t in which(part.read(0)[0])]
        here = [*local, *new]
        steps.append(
            Step(
                new,
                local,
                memory,
                dict.fromkeys(memory, 0) | {t: i for i, t in enumerate(here)},
                {t: others[t] for t in here},
            )
        )

    with FocusedAttention((0,), **settings)(model) as focused:
        hook = model.model.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            cache = focused.new_cache()
            model(ids[:, :prompt], past_key_values=cache)
            for t in range(prompt, tokens):
                model(ids[:, t : t + 1], past_key_values=cache)
        finally:
            hook.remove()
    return steps


def timeline(runs: Mapping[str, Sequence[Step]], prompt: int) -> go.Figure:
    """Where each token is, step by step: above what the layers see, below the positions at which they see it.

    runs: overflow rule -> steps of `trace`, equally many for all rules.
    """
    tokens = 1 + max(t for steps in runs.values() for t in steps[-1].new)
    fig = figure(height=560, margin={"l": 16, "r": 16, "t": 88, "b": 56})
    fig.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.16, row_heights=[0.4, 0.6])
    band = 1 / len(PLACES)
    scale = [[(i + j) * band, c] for i, c in enumerate(PLACES.values()) for j in (0, 1)]
    fig.add_heatmap(
        x=list(range(tokens)), y=["other layers", "memory layer"], z=[[None] * tokens] * 2, colorscale=scale,
        zmin=0, zmax=2, xgap=1, ygap=6, showscale=False, hoverongaps=False, row=1, col=1,
        hovertemplate="token %{x}, %{y}: %{customdata}<extra></extra>",
    )  # fmt: skip
    for i, name in enumerate(("memory layer", "other layers")):
        fig.add_scatter(
            x=[], y=[], mode="markers", name=f"position in {name}", row=2, col=1,
            marker={"symbol": ("circle", "x-thin")[i], "size": 8, "color": COLORS[i and 2],
                    "line": {"width": 2 * i, "color": COLORS[2]}},
            hovertemplate="token %{x}: position %{y}<extra>" + name + "</extra>",
        )  # fmt: skip
    for name, color in PLACES.items():
        marker = {"symbol": "square", "size": 12, "color": color}
        fig.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker, row=1, col=1)

    def update(overflow: str, step: int) -> dict:
        now = runs[overflow][step - 1]
        place = dict.fromkeys(now.memory, 0) | dict.fromkeys(now.local, 1) | dict.fromkeys(now.new, 2)
        memory = [place.get(t) for t in range(tokens)]
        other = [None if z == 0 else z for z in memory]
        words = [[None if z is None else list(PLACES)[z] for z in row] for row in (other, memory)]
        last = now.new[-1]
        what = f"token {last}, decoding" if last >= prompt else f"tokens {now.new[0]} to {last} of the prompt"
        points = [{"x": list(p), "y": list(p.values())} for p in (now.positions, now.other_positions)]
        title = f"reads {what}; {len(now.memory)} in the memory"
        return {
            "data": [{"z": [other, memory], "customdata": words}, *points],
            "layout": {"xaxis": {"title": {"text": title, "font": {"size": 14}}}},
        }

    highest = max(p for steps in runs.values() for s in steps for p in s.other_positions.values())
    fig.update_xaxes(range=[-0.6, tokens - 0.4], showgrid=False, zeroline=False)
    fig.update_xaxes(title="token", row=2, col=1)
    fig.update_yaxes(showgrid=False, row=1, col=1, tickangle=0)
    fig.update_yaxes(title="position of its key", range=[-0.8, highest + 0.8], gridcolor=GRID, row=2, col=1)
    counts = list(range(1, len(next(iter(runs.values()))) + 1))
    return controls(fig, {"overflow": list(runs), "step": counts}, update, play=False)


def found(
    series: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    trained: int | None = None,
    yaxis: str = "tokens of the needles right (%)",
    xaxis: str = "tokens in the memory",
) -> go.Figure:
    """Accuracy in percent by the size of the memory. series: name -> size -> one value (0 to 1) a seed.

    With several seeds a point is their mean and its bar the 95 % Student interval, cut at 0 and 100 %. trained: mark
    the most that was in the memory in training.
    """
    fig = figure(height=440, margin={"l": 64, "r": 16, "t": 88, "b": 56})
    for i, (name, points) in enumerate(series.items()):
        at = [(x, *interval(values)) for x, values in sorted(points.items())]
        high = [round(100 * (min(1, m + half) - m), 2) for _, m, half in at]
        low = [round(100 * (m - max(0, m - half)), 2) for _, m, half in at]
        fig.add_scatter(
            x=[round(x * (1 + 0.03 * i), 1) for x, *_ in at],  # bars of two lines stay apart
            y=[round(100 * m, 2) for _, m, _ in at],
            error_y={"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1.5,
                     "width": 4, "visible": any(high) or any(low)},
            mode="lines+markers",
            name=name,
            marker={"symbol": SYMBOLS[i % 4], "size": 8},
            line={"color": COLORS[i], "dash": "dot" if "top-k" in name else "solid"},
            customdata=[[f"{x:,}"] for x, *_ in at],
            hovertemplate="%{customdata[0]}: %{y} %<extra>" + name + "</extra>",
        )  # fmt: skip
    ticks = sorted({x for points in series.values() for x in points})
    fig.update_xaxes(
        title=xaxis, type="log", tickvals=ticks, ticktext=[f"{t:,}" for t in ticks], tickangle=-45
    )
    fig.update_yaxes(title=yaxis, range=[-4, 104])
    if trained is not None:
        fig.add_vline(x=trained, line={"color": GREY, "dash": "dash"})
        place = {"x": math.log10(trained), "y": 0.4, "yref": "paper", "yanchor": "bottom", "xanchor": "right"}
        fig.add_annotation(**place, text="most in training ", showarrow=False, textangle=0)
    return fig


def by_lookup(rows: Sequence[Mapping], models: Sequence[str], layers: int, start: int) -> go.Figure:
    """A slider over the size of the memory: accuracy of each model, time and bytes, dense and with top-k.

    rows: of the result needle-memory. layers: of the model, of which one has the memory; for the bytes of a full KV
    cache. Values are means over seeds; times are those of models[0].
    """
    sizes = sorted({r["tokens"] for r in rows})
    k = next(r["top_k"] for r in rows if r["top_k"])
    lookups = {"dense": None, f"top {k}": k}

    def values(key: str, tokens: int, model: str, top_k: int | None) -> float:
        same = (r for r in rows if (r["tokens"], r["model"], r["top_k"]) == (tokens, model, top_k))
        return mean(r[key] for r in same)

    fig = figure(height=600, margin={"l": 16, "r": 24, "t": 56, "b": 40}, showlegend=False)
    titles = ("tokens right (%)", "milliseconds of one core", "keys and values (MiB)")
    heights = [2 * len(models), 2, 2]
    fig.set_subplots(rows=3, cols=1, vertical_spacing=0.12, row_heights=heights, subplot_titles=titles)
    fig.for_each_annotation(
        lambda a: a.update(x=1, xanchor="right")
    )  # on a phone the middle is too far right
    names = [f"{m}, {look}" for m in models for look in lookups]
    labels = [names, list(lookups), ["memory, 1 layer", f"all {layers} layers"]]
    shades = [[COLORS[i // 2] for i in range(len(names))], [COLORS[0]] * 2, [COLORS[0], COLORS[6]]]
    for row, (y, colors) in enumerate(zip(labels, shades, strict=True), start=1):
        fig.add_bar(
            x=[0] * len(y), y=y, orientation="h", marker={"color": colors}, row=row, col=1,
            texttemplate="%{x:,}", textposition="outside", cliponaxis=False,
            hovertemplate="%{y}: %{x:,}<extra></extra>",
        )  # fmt: skip

    def bars(tokens: int) -> list[list[float]]:
        right = [values("accuracy", tokens, m, top) for m in models for top in lookups.values()]
        seconds = [values("answer_seconds", tokens, models[0], top) for top in lookups.values()]
        memory = values("memory_bytes", tokens, models[0], None) / 2**20
        return [
            [round(100 * x, 1) for x in right],
            [round(1000 * x, 1) for x in seconds],
            [round(memory, 2), round(layers * memory, 2)],
        ]

    def update(tokens: int) -> dict:
        return {"data": [{"x": x} for x in bars(tokens)]}

    most = [100, *(max(max(bars(t)[i]) for t in sizes) for i in (1, 2))]
    for row, top in enumerate(most, start=1):
        fig.update_xaxes(range=[0, 1.18 * top], gridcolor=GRID, row=row, col=1)
        fig.update_yaxes(autorange="reversed", showgrid=False, row=row, col=1)
    return controls(fig, {"tokens": sizes}, update, start={"tokens": start})
