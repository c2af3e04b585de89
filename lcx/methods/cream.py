"""Position labels that teach a long window inside a short one: CREAM, and the samplers it is compared with.

Every sampler returns `n` labels out of 0 ... n*factor-1, strictly increasing. The model still reads n tokens; only the
`position_ids` it is given change. Pass an all-ones `attention_mask` with them: without it transformers takes every
jump for the start of a new packed sequence and silently cuts the attention there.
"""

from __future__ import annotations

import numpy as np

from ..errors import LcxError

GRID = 1000  # points of the release's inverse-CDF table


def _check(n: int, factor: int) -> tuple[int, int]:
    if n < 3:
        raise LcxError(f"window n must be at least 3, got {n}: head, middle and tail need a label each")
    if factor < 1 or int(factor) != factor:
        raise LcxError(f"factor must be a whole number of at least 1, got {factor}: round it up")
    return int(n), int(factor)


def sample_alpha(
    factor: int, rng: np.random.Generator, *, sigma: float, size: int, release: bool = False
) -> np.ndarray:
    """alpha in [1, factor], the n-block in which the middle ends (float64 [size]).

    A Gaussian with mean (1 + factor) / 2 and standard deviation sigma / 2, truncated to [1, factor] and renormalised:
    sigma is in half blocks, as in the paper. `release=True` follows the released code instead, which clips (its mass
    beyond the ends is piled on them) and floors to half blocks.
    """
    import torch  # for the exact inverse of the normal distribution function

    low, high = (1 - factor) / sigma, (factor - 1) / sigma
    u = rng.random(size)
    if release:
        x = np.linspace(2, 2 * factor, GRID)
        cdf = torch.special.ndtr(torch.from_numpy((x - 1 - factor) / sigma)).numpy()
        return np.floor(np.interp(u, cdf, x)) / 2
    a, b = torch.special.ndtr(torch.tensor([low, high], dtype=torch.float64)).tolist()
    z = torch.special.ndtri(torch.from_numpy(a + u * (b - a))).numpy()
    return np.clip((1 + factor) / 2 + z * sigma / 2, 1, factor)


def cream_positions(
    n: int,
    factor: int,
    rng: np.random.Generator | None = None,
    *,
    sigma: float | None = None,
    relative_sigma: float = 3 / 8,
    k: int | None = None,
    p_relativity: float = 0.5,
    release: bool = False,
    size: int | None = None,
) -> np.ndarray:
    """CREAM labels (Wu et al. 2024, Algorithm 1): head 0 ... h-1, a middle run, tail ending at n*factor-1.

    n: tokens of an example. factor: target length over n. Returns int64 [n], or [size, n] with `size`.
    Each example flips a coin: relativity (three runs of n/3, many long distances) with probability `p_relativity`, or
    continuity (head and tail of `k` labels, one long middle; k defaults to 4*factor as released).
    sigma: spread of the middle in half blocks, the paper's unit; by default `relative_sigma * factor`, which is the
    released 3.0 at factor 8 and, unlike it, still covers every distance at factor 64.
    release: sigma 3.0, clipped and floored, as in the authors' code.

    Raises LcxError for n < 3, a factor that is not whole, sigma <= 0, or a k that leaves no middle.
    """
    n, factor = _check(n, factor)
    rng = np.random.default_rng() if rng is None else rng
    b = 1 if size is None else size
    if factor == 1:
        labels = np.tile(np.arange(n), (b, 1))
        return labels[0] if size is None else labels
    sigma = (3.0 if release else relative_sigma * factor) if sigma is None else sigma
    if sigma <= 0:
        raise LcxError(f"sigma must be positive, got {sigma}")
    k = 4 * factor if k is None else k
    if not 1 <= k or n - 2 * k < 1:
        raise LcxError(f"k = {k} leaves no middle in a window of {n}: use 1 <= k <= {(n - 1) // 2}")
    h = np.where(rng.random(b) < p_relativity, n // 3, k)  # head length = tail length
    m = n - 2 * h
    alpha = sample_alpha(factor, rng, sigma=sigma, size=b, release=release)
    low = np.floor(h + (m - 1) * alpha).astype(np.int64)
    high = np.maximum(np.floor(alpha * n).astype(np.int64) - h - 1, low)
    end = rng.integers(low, high, endpoint=True)
    start = end - (m - 1)
    i = np.arange(n)
    labels = i + (i >= h[:, None]) * (start - h)[:, None]
    labels += (i >= (n - h)[:, None]) * (n * factor - n - start + h)[:, None]
    return labels[0] if size is None else labels


def pose_positions(
    n: int, factor: int, rng: np.random.Generator | None = None, *, size: int | None = None
) -> np.ndarray:
    """PoSE labels (Zhu et al. 2023), two chunks: 0 ... l-1, then the rest shifted by u ~ U{0 ... n*factor - n}.

    The first chunk has l ~ U{1 ... ceil(n/2)} labels, as in the released code. Returns int64 [n] or [size, n].
    """
    n, factor = _check(n, factor)
    rng = np.random.default_rng() if rng is None else rng
    b = 1 if size is None else size
    first = rng.integers(1, -(-n // 2), size=b, endpoint=True)
    skip = rng.integers(0, n * factor - n, size=b, endpoint=True)
    i = np.arange(n)
    labels = i + (i >= first[:, None]) * skip[:, None]
    return labels[0] if size is None else labels


def randpos_positions(
    n: int, factor: int, rng: np.random.Generator | None = None, *, size: int | None = None
) -> np.ndarray:
    """Randomized positions (Ruoss et al. 2023): n labels drawn without replacement and sorted. int64 [n] or [size, n]."""
    n, factor = _check(n, factor)
    rng = np.random.default_rng() if rng is None else rng
    draws = [
        np.sort(rng.choice(n * factor, n, replace=False, shuffle=False))
        for _ in range(1 if size is None else size)
    ]
    return draws[0] if size is None else np.stack(draws)


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
