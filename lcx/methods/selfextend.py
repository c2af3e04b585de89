"""SelfExtend: far tokens share positions in groups, near ones keep theirs (Jin et al. 2024, arXiv:2401.01325). No training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import LcxError
from ..softmax import attend, merge
from .rope import rotate

TILE_BYTES = 2**25  # of scores at once, unless a single query needs more


def check_groups(group_size: int, neighbor_window: int) -> None:
    """Raise LcxError unless both are whole numbers of at least 1."""
    for name, value in {"group_size": group_size, "neighbor_window": neighbor_window}.items():
        if value < 1 or int(value) != value:
            raise LcxError(f"{name} must be a whole number of at least 1, got {value}")


def selfextend_distances(query: Tensor, key: Tensor, group_size: int, neighbor_window: int) -> Tensor:
    """The distances that the model is shown (section 3.2): true ones below neighbor_window, grouped ones from there on.

    query int64 [..., T], key int64 [..., S]: true positions. Returns int64 [..., T, S], negative for later keys. A
    distance of n becomes at most about neighbor_window + (n - neighbor_window) / group_size. Every division is rounded down,
    also where group_size does not divide neighbor_window, so that reading and decoding agree.

    Raises LcxError for a group_size or neighbor_window below 1.
    """
    check_groups(group_size, neighbor_window)
    i, j = query[..., :, None], key[..., None, :]
    grouped = i // group_size + _shift(group_size, neighbor_window) - j // group_size
    return torch.where(i - j < neighbor_window, i - j, grouped)


def _shift(group_size: int, neighbor_window: int) -> int:
    """What makes the grouped distances go on where the true ones end."""
    return neighbor_window - neighbor_window // group_size


def selfextend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    group_size: int,
    neighbor_window: int,
    scale: float | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Causal attention with the distances of `selfextend_distances`, near and far keys under one softmax.

    q [B, H, T, D]; k, v [B, Hkv, S, D], all before RoPE, H a multiple of Hkv. query_positions int64 [B, T], key_positions
    int64 [B, S]: true positions; a query sees the keys at its own and lower ones. cos, sin [P, D/2]: of the
    positions 0 … P-1, P above every position and above the largest distance shown. real: bool [B, S], False for padding.
    Returns [B, H, T, D]. Works tile by tile of queries: memory grows linearly with T and S, also in training, where
    tiles are computed again in the backward pass.

    Raises LcxError for a group_size or neighbor_window below 1.
    """
    check_groups(group_size, neighbor_window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    G, shift = group_size, _shift(group_size, neighbor_window)

    def tile(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        distance = i[:, :, None] - key_positions[:, None]
        visible = distance >= 0 if real is None else (distance >= 0) & real[:, None]
        near = distance < neighbor_window
        parts = []
        for mask, at, of in (
            (visible & near, i, key_positions),
            (visible & ~near, i // G + shift, key_positions // G),
        ):
            turned = rotate(q, cos[at], sin[at])
            for columns, part in _spans(mask):
                keys = rotate(k[:, :, columns], cos[of[:, columns]], sin[of[:, columns]])
                parts.append(attend(turned, keys, v[:, :, columns], scale, part))
        return merge(parts)[0].to(q.dtype) if parts else torch.zeros_like(q)

    size = max(1, TILE_BYTES // (4 * q[:, :, 0, 0].numel() * k.shape[2]))
    again = torch.is_grad_enabled() and size < q.shape[2]
    tiles = [
        checkpoint(tile, rows, k, v, i, use_reentrant=False) if again else tile(rows, k, v, i)
        for rows, i in zip(q.split(size, 2), query_positions.split(size, 1), strict=True)
    ]
    return torch.cat(tiles, 2)


def _spans(visible: Tensor) -> list[tuple[slice, Tensor | None]]:
    """The columns of visible [B, T, S] that a query sees: first those that all see, which need no mask, then the others."""
    seen = visible.flatten(0, 1)
    some = seen.any(0).nonzero().flatten().tolist()
    if not some:
        return []
    first, last = some[0], some[-1] + 1
    partly = (~seen[:, first:last].all(0)).nonzero().flatten().tolist()
    edge = first + partly[0] if partly else last
    spans = ((slice(first, edge), None), (slice(edge, last), visible[:, None, :, edge:last]))
    return [(columns, mask) for columns, mask in spans if columns.start < columns.stop]
