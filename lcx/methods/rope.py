"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864, section 3.4) as pure functions.

Queries and keys are rotated, pair of entries by pair of entries, by an angle that grows with the position. A
rotation by m and one by n differ by a rotation by m - n, so a score depends on the distance alone.

The angle is where precision is lost: position 262,144 times a frequency near 1 needs eighteen bits before the point,
which leaves float32 about 0.01 radians and bfloat16 nothing at all. So angles are computed in the dtype of the
frequencies (float64 unless you ask otherwise, float32 to reproduce transformers bit for bit, never less), and the
rotation in float32 or better, whatever the dtype of `x`.
"""

from __future__ import annotations

import math

import torch

PAIRS = ("half", "interleaved")


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The angular frequency of each pair: theta ** (-2j / head_dim) for j = 0 .. head_dim/2 - 1.

    Args:
        head_dim: size of a head; even.
        theta: the base (`rope_theta` in a config; the paper's 10,000).
        dtype: float64, or float32 to repeat the arithmetic of transformers exactly.

    Returns:
        [head_dim // 2] in radians a token, falling from 1 to about 1/theta.

    Raises:
        ValueError: for an odd or non-positive head_dim, theta <= 0, or a dtype other than float32 and float64.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"RoPE rotates pairs, so head_dim must be even and positive, got {head_dim}")
    if theta <= 0 or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"theta must be positive and dtype float32 or float64, got {theta} and {dtype}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim
    return 1.0 / (theta**exponent)


def wavelengths(frequencies: torch.Tensor) -> torch.Tensor:
    """Tokens that one full turn takes: 2 pi / frequency. Same shape as `frequencies`."""
    return 2 * math.pi / frequencies


def rope_cos_sin(position_ids: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, in the dtype of `frequencies` (half precision becomes float32).

    Args:
        position_ids: [T] or [B, T], integers or fractions (position interpolation makes fractions).
        frequencies: [D/2] in radians a token.

    Returns:
        cos, sin: [T, D/2] or [B, T, D/2].
    """
    if frequencies.dtype not in (torch.float32, torch.float64):
        frequencies = frequencies.float()
    angles = position_ids.to(frequencies.dtype)[..., None] * frequencies.to(position_ids.device)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: str = "half") -> torch.Tensor:
    """Rotate each pair of entries of `x` by the angle whose cosine and sine are given.

    Args:
        x: [..., T, D]; queries and keys are [B, H, T, D].
        cos, sin: [T, D/2] or [B, T, D/2]; the last axis may also be D with both halves equal, as
            `model.model.rotary_emb` of transformers returns it. A factor in both (YaRN's) scales the result.
        pairs: which entries form pair j. "half": j and j + D/2 (transformers, and every checkpoint in its format).
            "interleaved": 2j and 2j + 1 (the paper, Meta's LLaMA code). A checkpoint works with one of them only.

    Returns:
        the shape and dtype of `x`; computed in float32, or float64 when `x` is float64.

    Raises:
        ValueError: for an odd D, an unknown `pairs`, or cos and sin of another length.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2 or pairs not in PAIRS:
        raise ValueError(
            f"rotate needs an even last axis and pairs in {PAIRS}, got {x.shape[-1]} and {pairs!r}"
        )
    if cos.shape != sin.shape or cos.shape[-1] not in (half, 2 * half) or cos.shape[-2] != x.shape[-2]:
        raise ValueError(
            f"cos and sin must be [T, D/2] or [B, T, D/2] for x {tuple(x.shape)}, got {tuple(cos.shape)}"
        )
    work = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[..., :half].to(x.device, work) for t in (cos, sin))
    if cos.ndim == 3 and x.ndim == 4:
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, T, D/2]: the same angle in every head
    if pairs == "half":
        a, b = x.to(work).split(half, -1)
    else:
        a, b = x.to(work).unflatten(-1, (half, 2)).unbind(-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    y = torch.cat(turned, -1) if pairs == "half" else torch.stack(turned, -1).flatten(-2)
    return y.to(x.dtype)


def rope(
    x: torch.Tensor,
    position_ids: torch.Tensor,
    theta: float = 10000.0,
    *,
    frequencies: torch.Tensor | None = None,
    pairs: str = "half",
) -> torch.Tensor:
    """RoPE: rotate `x` to its positions (section 3.4.2 of the paper, equation 34).

    Args:
        x: queries or keys, [B, H, T, D] (or [T, D]).
        position_ids: [T] or [B, T].
        theta: the base; ignored when `frequencies` [D/2] are given (for scaled ones, or float32 ones).
        pairs: "half" or "interleaved", see `rotate`.

    Returns:
        the shape and dtype of `x`. Its length in the last axis does not change: rotations preserve norms.

    Raises:
        ValueError: as `rope_frequencies` and `rotate`.
    """
    if frequencies is None:
        frequencies = rope_frequencies(x.shape[-1], theta)
    return rotate(x, *rope_cos_sin(position_ids.to(x.device), frequencies), pairs=pairs)


def unseen_angle(distances: torch.Tensor, frequencies: torch.Tensor, window: int) -> torch.Tensor:
    """How far each angle lies outside the arc that training has shown, in radians.

    A model trained with `window` tokens has met the distances 0 .. window-1, so a pair with frequency f has turned
    through the arc from 0 to (window-1) f: the whole circle if its wavelength is shorter than that, else a part.
    An angle between two seen ones counts as seen.

    Args:
        distances: [N] distances between query and key in tokens, not negative.
        frequencies: [D/2] in radians a token.
        window: training window in tokens.

    Returns:
        [D/2, N] float64: 0 where the angle lies in the seen arc, else the angle to the nearer end of the arc (at most pi).
    """
    turn = 2 * math.pi
    end = ((window - 1) * frequencies.double())[:, None]
    angle = (frequencies.double()[:, None] * distances.double()[None]) % turn
    outside = torch.minimum(angle - end, turn - angle).clamp(min=0)
    return torch.where(end >= turn, torch.zeros_like(outside), outside)
