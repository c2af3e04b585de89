"""Chapter 8: which blocks a query opens, where they are put, and what reading them costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import torch

from ..methods.retrieval import distances
from .base import COLORS, controls, figure
from .distraction import GREY, GRID, SYMBOLS

FOUND, OTHER = COLORS[1], COLORS[0]
RULES: dict[str, Callable[[int, int], list[int]]] = {
    "the oldest": lambda n, k: list(range(k)),
    "the newest": lambda n, k: list(range(n - k, n)),
    "the oldest and the newest": lambda n, k: sorted({*range(k // 2), *range(n - k + k // 2, n)}),
    "every other one": lambda n, k: list(range((n - 1) % 2, n, 2))[-k:] if n >= 2 * k - 1 else list(range(n - k, n)),
}  # fmt: skip


def spans(text: torch.Tensor, needles: torch.Tensor, block_size: int) -> torch.Tensor:
    """First and last block of each needle, int64 [n, 2]. text: ids [N] without landmarks; needles: [n, L], each once in it."""
    windows = text.unfold(0, needles.shape[1], 1)
    start = (windows == needles[:, None]).all(-1).long().argmax(1)
    return torch.stack([start, start + needles.shape[1] - 1], 1) // (block_size - 1)


def hits(blocks: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """bool [..., T]: whether a query opened a block of its needle. blocks int64 [..., T, k]; span: first and last block."""
    return ((blocks >= span[0]) & (blocks <= span[1])).any(-1)


def chosen_slots(n: int, k: int, chosen: Sequence[int]) -> list[int]:
    """Slots of chosen blocks, of n in the cache: 0 is the farthest, k + 1 the local context. From lcx.methods.retrieval."""
    k = min(k, n)
    recent = torch.arange(n - k, n)[None]
    back = distances(torch.tensor(chosen)[None, None, None], recent)
    return (k + 1 - back).flatten().tolist()


def slots(blocks: Sequence[int], top_k: Sequence[int]) -> go.Figure:
    """Where chosen blocks are put, as blocks before the local context. Controls: blocks in the cache, top_k, which are chosen."""
    fig = figure(height=320, margin={"l": 16, "r": 16, "t": 48, "b": 64})
    for name, symbol, color in (("in the cache", "square-open", GREY), ("chosen", "square", COLORS[1])):
        marker = {"symbol": symbol, "size": 18, "color": color}
        fig.add_scatter(
            mode="markers+text", name=name, marker=marker, textposition="middle center", textfont={"size": 11},
            hovertemplate="block %{text}, %{customdata} blocks back<extra></extra>",
        )  # fmt: skip
    fig.add_scatter(mode="lines", line={"color": COLORS[1], "width": 1.5}, hoverinfo="skip", showlegend=False)
    marker = {"symbol": "square-open", "size": 18, "color": GREY}
    fig.add_scatter(mode="markers", marker=marker, hoverinfo="skip", showlegend=False)

    def update(blocks: int, top_k: int, chosen: str) -> dict:
        k = min(top_k, blocks)
        picked = RULES[chosen](blocks, k)
        slot = chosen_slots(blocks, k, picked)
        places = [s - k - 1 for s in slot]
        rest = [b for b in range(blocks) if b not in picked]
        empty = [s - k - 1 for s in range(k + 1) if s not in slot]
        x = [b - blocks for b in picked]
        lines = [v for a, b in zip(x, places, strict=True) for v in (a, b, None)]
        words = f"blocks before the local context<br>chosen blocks go to slots {', '.join(map(str, slot))} of 0 … {k}"
        return {
            "data": [
                {"x": [b - blocks for b in rest], "y": [1] * len(rest), "text": [str(b) for b in rest],
                 "customdata": [blocks - b for b in rest]},
                {"x": [*x, *places], "y": [1] * k + [0] * k, "text": [str(b) for b in picked] * 2,
                 "customdata": [-p for p in (*x, *places)]},
                {"x": lines, "y": [0.85, 0.15, None] * k},
                {"x": empty, "y": [0] * len(empty)},
            ],
            "layout": {"xaxis": {"title": {"text": words, "font": {"size": 13}}}},
        }  # fmt: skip

    most = max(blocks)
    fig.add_vrect(x0=-0.5, x1=0.7, fillcolor=COLORS[2], opacity=0.25, line_width=0)
    fig.add_annotation(x=0.1, y=0.5, text="local", textangle=-90, showarrow=False)
    fig.update_xaxes(
        range=[-most - 0.7, 0.7], showgrid=False, zeroline=False,
        tickvals=list(range(-most, 0, 2)), ticktext=[str(x) for x in range(most, 0, -2)],
    )  # fmt: skip
    fig.update_yaxes(
        range=[-0.5, 1.5], tickvals=[0, 1], ticktext=["seen at", "is at"], showgrid=False, zeroline=False
    )
    values = {"blocks": list(blocks), "top_k": list(top_k), "chosen": list(RULES)}
    return controls(
        fig,
        values,
        update,
        start={"blocks": blocks[-1], "top_k": top_k[-1], "chosen": "the oldest and the newest"},
    )


@dataclass(frozen=True)
class Asked:
    """A needle that was asked for. words: its tokens; says: the model's best token after each; span: its first and last
    block; opened: per layer, blocks int64 [H, T, k] of its T tokens."""

    words: list[str]
    says: list[str]
    span: tuple[int, int]
    opened: list[torch.Tensor]

    @classmethod
    def of(cls, tokenizer, needle: torch.Tensor, logits: torch.Tensor, trace, span: torch.Tensor) -> Asked:
        """needle [T], logits [T, V] of the same tokens and `trace`, what landmark.recording() gave while they were read in one row."""
        opened = []
        for layer in sorted({o.layer for o in trace}):
            parts = [o.blocks[0] for o in trace if o.layer == layer]
            heads, queries = (max(p.shape[i] for p in parts) for i in (0, 1))
            parts = [p.expand(heads, queries if len(parts) == 1 else -1, -1) for p in parts]
            opened.append(torch.cat(parts, 1)[:, : len(needle)])  # a landmark may follow
        word = tokenizer.convert_ids_to_tokens
        return cls(word(needle.tolist()), word(logits.argmax(-1).tolist()), tuple(span.tolist()), opened)


def theatre(asked: Sequence[Asked], blocks: int, start: Mapping | None = None) -> go.Figure:
    """The blocks each head opens for one token of a repeated needle. Controls: needle, token, layer. blocks: in the cache."""
    layers, (heads, tokens, _) = len(asked[0].opened), asked[0].opened[0].shape
    fig = figure(height=360, margin={"l": 16, "r": 16, "t": 88, "b": 64})
    fig.add_scatter(
        mode="markers", name="blocks of the needles", marker={"symbol": "triangle-down", "size": 8, "color": COLORS[6]},
        hovertemplate="needle %{text}, block %{x}<extra></extra>",
    )  # fmt: skip
    for name, symbol, color in (
        ("opened", "square-open", OTHER),
        ("opened: the one asked for", "square", FOUND),
    ):
        fig.add_scatter(
            mode="markers", name=name, marker={"symbol": symbol, "size": 7, "color": color, "line": {"width": 1.5, "color": color}},
            hovertemplate="head %{y} opens block %{x}<extra></extra>",
        )  # fmt: skip

    def update(needle: int, token: int, layer: int) -> dict:
        now = asked[needle - 1]
        opened = now.opened[layer][:, token - 1]
        pairs = [(h, b) for h in range(heads) for b in opened[h].tolist() if b >= 0]
        good = [(h, b) for h, b in pairs if now.span[0] <= b <= now.span[1]]
        bad = [p for p in pairs if p not in good]
        said = f"says {now.says[token - 1]}"
        if token < tokens:
            said += " (right)" if now.says[token - 1] == now.words[token] else f", not {now.words[token]}"
        sure = " (two tokens say which needle is meant)" if token == 1 else ""
        words = f"{now.words[token - 1]} in layer {layer}: {len({h for h, _ in good})} of {heads} heads open its block"
        marks: dict[int, str] = {}  # block -> the needles in it
        for i, a in enumerate(asked):
            for b in sorted(set(a.span)):
                marks[b] = f"{marks[b]} and {i + 1}" if b in marks else str(i + 1)
        return {
            "data": [
                {"x": list(marks), "y": [heads] * len(marks), "text": list(marks.values()),
                 "marker": {"color": [FOUND if b in now.span else COLORS[6] for b in marks]}},
                *({"x": [b for _, b in part], "y": [h for h, _ in part]} for part in (bad, good)),
            ],
            "layout": {"xaxis": {"title": {"text": f"{words}<br>the model {said}{sure}", "font": {"size": 13}}}},
        }  # fmt: skip

    fig.update_xaxes(range=[-1, blocks], showgrid=True, zeroline=False)
    names = [f"head {h}" for h in range(heads)] + ["needles"]
    fig.update_yaxes(
        range=[heads + 0.6, -0.6], tickvals=list(range(heads + 1)), ticktext=names, zeroline=False
    )
    counts = (len(asked), tokens)
    values = {"needle": list(range(1, counts[0] + 1)), "token": list(range(1, counts[1] + 1))}
    return controls(fig, values | {"layer": list(range(layers))}, update, start=start)


def hit_rates(rates: torch.Tensor, chance: float) -> go.Figure:
    """How often each head of each layer opens a block of the needle, in percent. rates [layers, H], 0 to 1; chance: of a random choice."""
    fig = figure(height=380)
    for head in range(rates.shape[1]):
        fig.add_bar(
            x=[f"layer {i}" for i in range(len(rates))],
            y=(100 * rates[:, head]).round(decimals=1).tolist(),
            name=f"head {head}",
            marker={"color": COLORS[head % len(COLORS)]},
            hovertemplate="%{x}: %{y} %<extra>" + f"head {head}</extra>",
        )
    fig.add_hline(y=100 * chance, line={"color": GREY, "dash": "dash"})
    fig.add_annotation(
        x=0, xref="paper", xanchor="left", y=100 * chance, yanchor="bottom", showarrow=False,
        text=f" at random: {100 * chance:.1f} %",
    )  # fmt: skip
    fig.update_yaxes(title="opens a block of the needle (%)", range=[0, 104])
    fig.update_layout(barmode="group")
    return fig


def price(rows: Sequence[Mapping], texts: Mapping[int, int], start: int) -> go.Figure:
    """Whole needles found, with their Wilson interval, against the bytes of blocks read per token; a slider over the length.

    rows: of the result landmark-needles, one model and seed, mode "retrieval", several top_k. texts: how many texts of each length were read.
    """
    lengths = sorted({r["tokens"] for r in rows})
    ks = sorted({r["top_k"] for r in rows})
    fig = figure(height=420)
    for i, k in enumerate(ks):
        fig.add_scatter(
            mode="markers", name=f"top_k {k}",
            marker={"symbol": SYMBOLS[i % 4], "size": 11, "color": COLORS[i]}, error_y={"type": "data", "symmetric": False},
            hovertemplate=f"top_k {k}: " + "%{y} % for %{x} KiB a token<extra></extra>",
        )  # fmt: skip

    def update(tokens: int) -> dict:
        data = []
        for k in ks:
            r = next(r for r in rows if (r["top_k"], r["tokens"]) == (k, tokens))
            kib = r["bytes_read"]["blocks"] / (texts[tokens] * tokens) / 2**10
            up, down = r["whole_high"] - r["whole"], r["whole"] - r["whole_low"]
            error = {"array": [round(100 * up, 1)], "arrayminus": [round(100 * down, 1)]}
            data.append({"x": [round(kib, 2)], "y": [round(100 * r["whole"], 1)], "error_y": error})
        return {"data": data}

    most = max(r["bytes_read"]["blocks"] / (texts[r["tokens"]] * r["tokens"]) for r in rows) / 2**10
    fig.update_xaxes(title="KiB of blocks read for each token", range=[0, 1.15 * most])
    fig.update_yaxes(title="whole needles found (%)", range=[0, 104])
    return controls(fig, {"tokens": lengths}, update, start={"tokens": start})


def fetched(counts: Mapping[str, Sequence[float]], available: float) -> go.Figure:
    """Distinct blocks that a chunk of queries opens, per layer. counts: granularity -> mean of each layer; available: blocks there are."""
    fig = figure(height=380)
    for i, (name, values) in enumerate(counts.items()):
        fig.add_bar(
            x=[f"layer {layer}" for layer in range(len(values))], y=[round(v, 1) for v in values], name=name,
            marker={"color": COLORS[i]}, hovertemplate="%{x}: %{y} blocks<extra>" + name + "</extra>",
        )  # fmt: skip
    fig.add_hline(y=available, line={"color": GREY, "dash": "dash"})
    fig.add_annotation(
        x=1, xref="paper", xanchor="right", y=available, yanchor="top", showarrow=False, text="all there are"
    )
    fig.update_yaxes(title="blocks opened by a chunk", range=[0, 1.08 * available])
    fig.update_layout(barmode="group")
    return fig


def decode(rows: Sequence[Mapping]) -> go.Figure:
    """One decoding step by the tokens in the cache: milliseconds above, bytes of keys and values below. rows: of landmark-decode."""
    fig = figure(height=620, margin={"l": 64, "r": 16, "t": 72, "b": 56})
    fig.set_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    tokens = [r["tokens"] for r in rows]
    lines = (
        ("dense", "dense_ms", "dense_bytes"), ("landmark", "landmark_ms", "bytes"), ("scoring landmarks alone", "scoring_ms", None),
    )  # fmt: skip
    for i, (name, ms, nbytes) in enumerate(lines):
        for row, key, scale in ((1, ms, 1), (2, nbytes, 2**20)):
            if key:
                fig.add_scatter(
                    x=tokens, y=[round(r[key] / scale, 4) for r in rows], name=name, mode="lines+markers",
                    marker={"symbol": SYMBOLS[i], "size": 8}, line={"color": COLORS[i]}, showlegend=row == 1, row=row, col=1,
                    hovertemplate="%{x:,} tokens: %{y}<extra>" + name + "</extra>",
                )  # fmt: skip
    ticks = {"tickvals": tokens, "ticktext": [f"{t // 1024}k" for t in tokens], "gridcolor": GRID}
    fig.update_xaxes(type="log", **ticks)
    fig.update_xaxes(title="tokens in the cache", row=2, col=1)
    fig.update_yaxes(type="log", dtick=1, gridcolor=GRID, title="milliseconds", row=1, col=1)
    fig.update_yaxes(type="log", dtick=1, gridcolor=GRID, title="MiB read", row=2, col=1)
    return fig


def by_tokens(rows: Sequence[Mapping], key: str = "accuracy", **same) -> dict[int, list[float]]:
    """Tokens -> one value a seed, of the rows whose fields equal `same`."""
    rows = [r for r in rows if all(r[k] == v for k, v in same.items())]
    return {n: [r[key] for r in rows if r["tokens"] == n] for n in sorted({r["tokens"] for r in rows})}
