"""Position labels that teach a long window inside a short one: CREAM, and the samplers it is compared with.

Every sampler returns `n` labels out of 0 ... n*factor-1, strictly increasing. The model still reads n tokens; only the
`position_ids` it is given change. Pass an all-ones `attention_mask` with them: without it transformers takes every
jump for the start of a new packed sequence and silently cuts the attention there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from ..errors import LcxError

GRID = 1000  # points of the release's inverse-CDF table


class Each:
    """Generators that stand for one: drawing as many numbers as there are takes one from each, as it would be drawn alone.

    So row i of a batch depends on generator i alone. `cream_positions`, `pose_positions` and `randpos_positions` take a
    list of generators and use it through this.
    """

    def __init__(self, generators: Sequence[np.random.Generator]):
        self.generators = generators

    def random(self, size: int) -> np.ndarray:
        return np.array([g.random() for g in self.generators])

    def integers(self, low, high, size: int | None = None, endpoint: bool = False) -> np.ndarray:
        low, high = (np.broadcast_to(x, len(self.generators)).tolist() for x in (low, high))
        bounds = zip(self.generators, low, high, strict=True)
        return np.array([g.integers(a, b, endpoint=endpoint) for g, a, b in bounds])


Random = np.random.Generator | Sequence[np.random.Generator] | None


def _rows(rng: Random, size: int | None) -> tuple[np.random.Generator | Each, int, bool]:
    """(what to draw from, rows, is the result a single row without the first axis)."""
    if isinstance(rng, Sequence):
        return Each(rng), len(rng), False
    return np.random.default_rng() if rng is None else rng, 1 if size is None else size, size is None


def _shifted(n: int, lengths, shifts) -> np.ndarray:
    """0 ... n-1 in runs, each moved up by its shift; lengths and shifts: runs, each int [B] -> int64 [B, n]."""
    b = len(lengths[-1])
    flat = [np.stack([np.broadcast_to(x, b) for x in xs], 1).ravel() for xs in (lengths, shifts)]
    labels = np.repeat(flat[1], flat[0]).reshape(b, n)
    labels += np.arange(n)
    return labels


def _check(n: int, factor: int) -> tuple[int, int]:
    if n < 3:
        raise LcxError(f"window n must be at least 3, got {n}: head, middle and tail need a label each")
    if not factor >= 1 or factor % 1:
        raise LcxError(f"factor must be a whole number of at least 1, got {factor}: round it up")
    return int(n), int(factor)


def sample_alpha(
    factor: int, rng: np.random.Generator | Each, *, sigma: float, size: int, release: bool = False
) -> np.ndarray:
    """alpha in [1, factor], the n-block in which the middle ends (float64 [size]).

    A Gaussian with mean (1 + factor) / 2 and standard deviation sigma / 2, truncated to [1, factor] and renormalised:
    sigma is in half blocks, as in the paper. `release=True` follows the released code instead, which clips (its mass
    beyond the ends is piled on them) and floors to half blocks.
    """
    u = rng.random(size)
    if release:
        return np.floor(_clipped(u, factor, sigma)) / 2
    low, high = ndtr(np.array([1 - factor, factor - 1]) / sigma)
    z = ndtri(low + u * (high - low))
    return np.clip((1 + factor) / 2 + z * sigma / 2, 1, factor)


def _clipped(u: np.ndarray, factor: int, sigma: float) -> np.ndarray:
    """2 alpha of the release before it floors: u through a table of the inverse distribution function, which ends at 2 and 2f."""
    x = np.linspace(2, 2 * factor, GRID)
    return np.interp(u, ndtr((x - 1 - factor) / sigma), x)


def cream_positions(
    n: int,
    factor: int,
    rng: Random = None,
    *,
    sigma: float | None = None,
    relative_sigma: float = 3 / 8,
    k: int | None = None,
    p_relativity: float = 0.5,
    release: bool = False,
    size: int | None = None,
) -> np.ndarray:
    """CREAM labels (Wu et al. 2024, Algorithm 1): head 0 ... h-1, a middle run, tail ending at n*factor-1.

    n: tokens of an example. factor: target length over n. Returns int64 [n], or [size, n] with `size`. rng: a
    generator, or a list of generators, which gives [len(rng), n]: each row as its own generator would draw it alone.
    Each example flips a coin: relativity (three runs of n/3, many long distances) with probability `p_relativity`, or
    continuity (head and tail of `k` labels, one long middle; k defaults to 4*factor as released).
    sigma: spread of the middle in half blocks, the paper's unit; by default `relative_sigma * factor`, which is the
    released 3.0 at factor 8 and, unlike it, still covers every distance at factor 64.
    release: sigma 3.0, clipped and floored, as in the authors' code.

    Raises LcxError for n < 3, a factor that is not whole, sigma <= 0, or a k that leaves no middle.
    """
    n, factor = _check(n, factor)
    rng, b, single = _rows(rng, size)
    if factor == 1:
        labels = np.tile(np.arange(n), (b, 1))
        return labels[0] if single else labels
    sigma = (3.0 if release else relative_sigma * factor) if sigma is None else sigma
    if not 0 < sigma < np.inf:
        raise LcxError(f"sigma must be positive, got {sigma}")
    k = 4 * factor if k is None else k
    if not 1 <= k or k % 1 or n - 2 * k < 1:
        raise LcxError(
            f"k = {k} leaves no middle in a window of {n}: use a whole number from 1 to {(n - 1) // 2}"
        )
    h = np.where(rng.random(b) < p_relativity, n // 3, int(k))  # head length = tail length
    m = n - 2 * h
    alpha = sample_alpha(factor, rng, sigma=sigma, size=b, release=release)
    low = np.floor(h + (m - 1) * alpha).astype(np.int64)
    high = np.maximum(np.floor(alpha * n).astype(np.int64) - h - 1, low)
    end = rng.integers(low, high, endpoint=True)
    start = end - (m - 1)
    labels = _shifted(n, (h, m, h), (0, start - h, n * factor - n))
    return labels[0] if single else labels


def pose_positions(n: int, factor: int, rng: Random = None, *, size: int | None = None) -> np.ndarray:
    """PoSE labels (Zhu et al. 2023), two chunks: 0 ... l-1, then the rest shifted by u ~ U{0 ... n*factor - n}.

    The first chunk has l ~ U{1 ... ceil(n/2)} labels, as in the released code. Returns int64 [n] or [size, n];
    rng as in `cream_positions`.
    """
    n, factor = _check(n, factor)
    rng, b, single = _rows(rng, size)
    first = rng.integers(1, -(-n // 2), size=b, endpoint=True)
    skip = rng.integers(0, n * factor - n, size=b, endpoint=True)
    labels = _shifted(n, (first, n - first), (0, skip))
    return labels[0] if single else labels


def randpos_positions(n: int, factor: int, rng: Random = None, *, size: int | None = None) -> np.ndarray:
    """Randomized positions (Ruoss et al. 2023): n labels drawn without replacement and sorted. int64 [n] or [size, n].

    rng as in `cream_positions`.
    """
    n, factor = _check(n, factor)
    rng, b, single = _rows(rng, size)
    generators = rng.generators if isinstance(rng, Each) else [rng] * b
    labels = np.stack([g.choice(n * factor, n, replace=False, shuffle=False) for g in generators])
    labels.sort()
    return labels[0] if single else labels


BATCHED = (cream_positions, pose_positions, randpos_positions)  # take a list of generators


def longrecipe_positions(sentence_lengths, factor: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """LongRecipe-style labels (Hu et al. 2024): sentences stay whole, random gaps push them apart. int64 [n].

    sentence_lengths: tokens of each sentence, summing to n. The first sentence starts at 0; of the L - n + S slots
    (L = n*factor, S sentences) S hold a sentence each, in order, the others are gaps of one label. The first
    rho ~ U{1 ... ceil(n/2)} labels are then made contiguous, as in the released code.
    """
    lengths = np.asarray(sentence_lengths, dtype=np.int64)
    if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
        raise LcxError("sentence_lengths must be a list of whole numbers of at least 1")
    n, factor = _check(int(lengths.sum()), factor)
    rng = np.random.default_rng() if rng is None else rng
    s = lengths.size
    slots = np.sort(rng.choice(n * factor - n + s - 1, s - 1, replace=False)) + 1
    gaps = np.concatenate([[0], slots - np.arange(1, s)])  # unused slots before each sentence
    labels = np.arange(n) + np.repeat(gaps, lengths)
    rho = int(rng.integers(1, -(-n // 2), endpoint=True))
    labels[:rho] = np.arange(rho)
    return labels
