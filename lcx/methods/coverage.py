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
    distance, label = np.zeros(length), np.zeros(length)
    for _ in range(examples):
        p = draw(rng)
        label[p] += 1
        distance += _distances(p, length)
    distance[0] = 0
    return Coverage(n, factor, examples, distance / examples, label / examples)


def _distances(p: np.ndarray, length: int) -> np.ndarray:
    """0/1 for each distance 0 ... length-1: does it occur between two labels of p?"""
    cuts = np.flatnonzero(np.diff(p) != 1) + 1
    if len(cuts) > 8:  # scattered labels: the autocorrelation counts every pair at once
        x = np.zeros(2 * length)
        x[p] = 1
        f = np.fft.rfft(x)
        return (np.fft.irfft(f * f.conj())[:length] > 0.5).astype(float)
    first, last = p[np.r_[0, cuts]], p[np.r_[cuts - 1, len(p) - 1]]
    seen = np.zeros(length)
    for a in range(
        len(first)
    ):  # two runs a <= b are at every distance from first[b]-last[a] to last[b]-first[a]
        for b in range(a, len(first)):
            seen[max(0, first[b] - last[a]) : last[b] - first[a] + 1] = 1
    return seen
