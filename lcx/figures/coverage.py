"""Chapter 10: which labels a sampler gives to the tokens of a row, and which distances and labels of the long text they cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import plotly.graph_objects as go

from ..methods import cream
from ..methods.coverage import Coverage, coverage
from .base import COLORS, controls, figure
from .distraction import GREY, GRID

SHOWN, BINS = 6, 48  # rows drawn one by one; bins of the curves
RUNS = {"first run": COLORS[0], "middle": COLORS[1], "last run": COLORS[2]}
QUARTERS = {"tickvals": [0, 0.25, 0.5, 0.75, 1], "ticktext": ["0", "L/4", "L/2", "3L/4", "L"]}

Draw = Callable[..., np.ndarray]  # (generator, size=) -> int64 [size, n]


def designs(n: int, factor: int) -> dict[str, Draw]:
    """The samplers that the explorer offers, for rows of n tokens: name -> draw(rng, size=)."""
    labels = partial(cream.cream_positions, n, factor, k=small_k(n, factor))
    return {
        "CREAM": labels,
        "continuity alone": partial(labels, p_relativity=0.0),
        "relativity alone": partial(labels, p_relativity=1.0),
        "PoSE": partial(cream.pose_positions, n, factor),
        "RandPos": partial(cream.randpos_positions, n, factor),
        "ordinary labels": lambda rng, size: np.tile(np.arange(n), (size, 1)),
    }


def small_k(n: int, factor: int) -> int:
    """The released rule 4 * factor, where that is small against the window, else a sixteenth of it."""
    return min(4 * factor, n // 16)


def covered(draw: Draw, n: int, factor: int, examples: int, seed: int = 0) -> Coverage:
    """`lcx.coverage` of labels that are drawn all at once, which takes less time."""
    rows = iter(draw(np.random.default_rng(seed), size=examples))
    return coverage(lambda _: next(rows), n, factor, examples=examples)


def binned(values: np.ndarray, bins: int = BINS) -> list[float]:
    """Mean of [L] values in `bins` parts of equal width, in percent."""
    edges = np.linspace(0, len(values), bins + 1).round().astype(int)
    return [round(100 * float(values[a:b].mean()), 1) for a, b in zip(edges, edges[1:], strict=False)]


def run_lines(labels: np.ndarray, length: int) -> list[dict[str, list]]:
    """Lines for first run, middle and last run of each row of labels [rows, n]; x is the share of the target length."""
    lines: list[dict[str, list]] = [{"x": [], "y": []} for _ in RUNS]
    for y, p in enumerate(labels):
        cuts = np.flatnonzero(np.diff(p) != 1) + 1
        for i, run in enumerate(np.split(p, cuts)):
            if len(cuts) > 2 and i % -(-len(cuts) // 48):
                continue  # of scattered labels some 48 a row
            part = lines[0 if i == 0 or len(cuts) > 2 else 2 if i == len(cuts) == 2 else 1]
            part["x"] += [round(float(run[0]) / length, 4), round(float(run[-1] + 1) / length, 4), None]
            part["y"] += [y, y, None]
    return lines


def rows_of(labels: Mapping[str, np.ndarray], length: int) -> go.Figure:
    """One row of labels a name on the axis of the long text. labels: name -> int64 [n]."""
    fig = figure(height=120 + 44 * len(labels), margin={"l": 16, "r": 16, "t": 56, "b": 56})
    for (name, color), line in zip(RUNS.items(), run_lines(list(labels.values()), length), strict=True):
        fig.add_scatter(
            x=[None if x is None else round(x * length) for x in line["x"]], y=line["y"], name=name, mode="lines",
            line={"color": color, "width": 14}, hovertemplate="label %{x:,}<extra>" + name + "</extra>",
        )  # fmt: skip
    fig.update_xaxes(title="position label", range=[-0.01 * length, 1.01 * length], zeroline=False)
    fig.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=list(labels), range=[len(labels) - 0.5, -0.5], showgrid=False, zeroline=False
    )  # fmt: skip
    return fig


def _curves(fig: go.Figure, first: int) -> None:
    """Two filled curves in the rows `first` and `first + 1`: distances, and labels."""
    x = [round((i + 0.5) / BINS, 4) for i in range(BINS)]
    for row, color, what in ((first, COLORS[3], "distance"), (first + 1, COLORS[5], "label")):
        fig.add_scatter(
            x=x, y=[0] * BINS, mode="lines", fill="tozeroy", line={"color": color, "shape": "hvh"}, showlegend=False,
            row=row, col=1, hovertemplate=what + " %{x:.2f} L: %{y} %<extra></extra>",
        )  # fmt: skip


def _words(c: Coverage) -> str:
    return (
        f"in none of {c.examples:,} rows:<br>{c.missed_distances:.0%} of the distances, {c.missed_labels:.0%} of the labels"
    )  # fmt: skip


def explorer(
    windows: Sequence[int], factors: Sequence[int], start: Mapping, examples: int = 300
) -> go.Figure:
    """Some rows of labels, and how many rows hold a distance and a label. Controls: N, factor, design."""
    fig = figure(height=700, margin={"l": 16, "r": 16, "t": 128, "b": 56})
    fig.set_subplots(rows=3, cols=1, vertical_spacing=0.13)
    for name, color in RUNS.items():
        fig.add_scatter(
            mode="lines", name=name, line={"color": color, "width": 7}, row=1, col=1, hovertemplate="%{x} L<extra>" + name + "</extra>"
        )  # fmt: skip
    _curves(fig, 2)

    def update(N: int, factor: int, design: str) -> dict:
        draw = designs(N, factor)[design]
        few = examples if design != "RandPos" else 12  # each of them covers nearly everything
        c = covered(draw, N, factor, few)
        k = f", k = {small_k(N, factor)}" if design in ("CREAM", "continuity alone") else ""
        words = f"L = {N * factor:,}{k}; {_words(c)}"
        even = binned(c.label * factor)  # 100 %: as often as if all labels were equally frequent
        lines = run_lines(draw(np.random.default_rng(1), size=SHOWN), N * factor)
        return {
            "data": [*lines, {"y": binned(c.distance[1:])}, {"y": even}],
            "layout": {"title": {"text": words.replace("; ", "<br>"), "font": {"size": 14}, "y": 0.97}},
        }

    fig.update_xaxes(range=[-0.01, 1.01], gridcolor=GRID, zeroline=False, **QUARTERS)
    fig.update_yaxes(
        showticklabels=False, showgrid=False, title=f"{SHOWN} rows", zeroline=False, row=1, col=1
    )
    _axes(fig, 2)
    values = {"N": list(windows), "factor": list(factors), "design": list(designs(64, 8))}
    return controls(fig, values, update, start=start)


def _axes(fig: go.Figure, first: int) -> None:
    fig.update_xaxes(automargin=True)
    fig.update_yaxes(automargin=True)
    fig.update_yaxes(title="rows with the<br>distance (%)", range=[0, 104], gridcolor=GRID, row=first, col=1)
    fig.update_xaxes(title="distance", row=first, col=1)
    fig.update_yaxes(
        title="label, against<br>even use (%)", rangemode="tozero", gridcolor=GRID, row=first + 1, col=1
    )
    fig.update_xaxes(title="label", row=first + 1, col=1)


def alpha_shares(factor: int, sigma: float, release: bool, draws: int = 20_000) -> list[float]:
    """Percent of rows whose middle ends in each of BINS parts of the long text, from draws of alpha / factor."""
    alpha = cream.sample_alpha(factor, np.random.default_rng(0), sigma=sigma, size=draws, release=release)
    counts = np.histogram(alpha / factor, bins=BINS, range=(0, 1 + 1e-9))[0]
    return [round(v, 1) for v in (100 * counts / draws).tolist()]


def spread(
    n: int,
    factors: Sequence[int],
    sigmas: Sequence[float],
    ks: Sequence[int],
    start: Mapping,
    examples: int = 200,
) -> go.Figure:
    """What sigma and k do: where the middle ends, and the coverage. Controls: factor, sigma in half windows, k, Gaussian."""
    fig = figure(height=680, margin={"l": 16, "r": 16, "t": 88, "b": 56})
    fig.set_subplots(rows=3, cols=1, vertical_spacing=0.15)
    x = [round((i + 0.5) / BINS, 4) for i in range(BINS)]
    fig.add_bar(
        x=x, marker={"color": COLORS[1], "line": {"width": 0}}, showlegend=False, row=1, col=1, hovertemplate="%{x:.2f} L: %{y} %<extra></extra>"
    )  # fmt: skip
    _curves(fig, 2)
    shares = {}  # alpha does not know k
    laws = {"truncated": False, "released: clipped, floored": True}

    def update(factor: int, sigma: float, k: int, Gaussian: str) -> dict:
        release = laws[Gaussian]
        if (factor, sigma, release) not in shares:
            shares[factor, sigma, release] = alpha_shares(factor, sigma, release)
        draw = partial(cream.cream_positions, n, factor, sigma=sigma, k=k, release=release)
        c = covered(draw, n, factor, examples)
        return {
            "data": [
                {"y": shares[factor, sigma, release]},
                {"y": binned(c.distance[1:])},
                {"y": binned(c.label * factor)},
            ],
            "layout": {
                "title": {"text": f"N = {n:,}, L = {n * factor:,}<br>{_words(c)}", "font": {"size": 14}}
            },
        }

    fig.update_xaxes(range=[-0.01, 1.01], gridcolor=GRID, zeroline=False, **QUARTERS)
    fig.update_xaxes(title="end of the middle's window", row=1, col=1)
    fig.update_yaxes(title="rows (%)", rangemode="tozero", gridcolor=GRID, row=1, col=1)
    _axes(fig, 2)
    fig.update_yaxes(range=[0, 50], row=2, col=1)  # only the nearest distances, inside a run, are above
    fig.update_layout(bargap=0)
    values = {"factor": list(factors), "sigma": list(sigmas), "k": list(ks), "Gaussian": list(laws)}
    return controls(fig, values, update, start=start)


def missed(curves: Mapping[str, Coverage]) -> go.Figure:
    """How many rows hold each distance, one curve a sampler on one target length. curves: name -> coverage."""
    fig = figure(height=400)
    x = [round((i + 0.5) / BINS, 4) for i in range(BINS)]
    for i, (name, c) in enumerate(curves.items()):
        fig.add_scatter(
            x=x, y=binned(c.distance[1:]), name=name, mode="lines", line={"color": COLORS[i], "width": 2.5, "dash": ("solid", "dash", "dot")[i % 3]},
            hovertemplate="distance %{x:.2f} L: %{y} %<extra>" + name + "</extra>",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": GREY})
    fig.update_xaxes(title="relative distance", range=[0, 1], **QUARTERS)
    # the nearest distances, inside a run, are far above all others
    most = max(max(binned(c.distance[1:])[1:]) for c in curves.values())
    fig.update_yaxes(title="rows that hold it (%)", range=[-0.03 * most, 1.1 * most])
    return fig
