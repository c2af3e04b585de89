"""Which relative distances and labels a position sampler ever trains: look before spending GPU hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Coverage:
    """distance, label: float64 [L], the fraction of examples in which that relative distance (index 0 unused) or
    label occurs. `examples` were drawn."""

    n: int
    factor: int
    examples: int
    distance: np.ndarray
    label: np.ndarray

    @property
    def missed_distances(self) -> float:
        """Fraction of the distances 1 ... L-1 that no example holds."""
        return float((self.distance[1:] == 0).mean())

    @property
    def missed_labels(self) -> float:
        """Fraction of the labels 0 ... L-1 that no example holds."""
        return float((self.label == 0).mean())

    def band(self, low: float, high: float) -> float:
        """Mean probability over the distances in [low*L, high*L)."""
        length = len(self.distance)
        return float(self.distance[max(1, round(low * length)) : round(high * length)].mean())


def coverage(
    draw: Callable[[np.random.Generator], np.ndarray],
    n: int,
    factor: int,
    *,
    examples: int = 3000,
    seed: int = 0,
) -> Coverage:
    """Draw `examples` label vectors with `draw(rng)` (int64 [n], increasing) and count what they cover."""
    length = n * factor
    rng = np.random.default_rng(seed)
    label, distance, edges = np.zeros(length), np.zeros(length), np.zeros(length + 1)
    for _ in range(examples):
        p = draw(rng)
        label[p] += 1
        cuts = np.flatnonzero(np.diff(p) != 1) + 1
        if len(cuts) > 8:  # scattered labels: the autocorrelation counts every pair at once
            x = np.zeros(2 * length)
            x[p] = 1
            f = np.fft.rfft(x)
            distance += np.fft.irfft(f * f.conj())[:length] > 0.5
        else:
            for low, high in _spans(p[np.append(0, cuts)], p[np.append(cuts - 1, -1)]):
                edges[low] += 1
                edges[high + 1] -= 1
    distance += np.cumsum(edges)[:-1]
    distance[0] = 0
    return Coverage(n, factor, examples, distance / examples, label / examples)


def _spans(first: np.ndarray, last: np.ndarray) -> list[tuple[int, int]]:
    """Distances between labels of the runs first ... last, as disjoint ranges with both ends."""
    f, e = first.tolist(), last.tolist()
    pairs = sorted((max(0, f[b] - e[a]), e[b] - f[a]) for b in range(len(f)) for a in range(b + 1))
    spans = pairs[:1]
    for low, high in pairs[1:]:
        if low > spans[-1][1]:
            spans.append((low, high))
        elif high > spans[-1][1]:
            spans[-1] = (spans[-1][0], high)
    return spans
