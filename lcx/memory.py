"""The external memory of the Focused Transformer: keys and values of the past, attended to exactly or by lookup.

`attend` is attention over one tile; `merge` joins tiles under one softmax, so that no tile has to see another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over one tile of keys and values, with the log-sum-exp that `merge` needs.

    q [B, H, T, D]; k, v [B or 1, Hkv, S, D]; H is a multiple of Hkv, query head h reads head h // (H // Hkv).
    mask: bool, broadcastable to [B, H, T, S], True = visible. Differentiable in q, k and v.
    Returns out [B, H, T, D] and lse [B, H, T], in float32 or, for float64 input, float64.
    A query that sees nothing gets out = 0 and lse = -inf.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    q = (
        q.to(dtype).unflatten(1, (k.shape[1], -1)) * scale
    )  # [B, Hkv, H/Hkv, T, D]: GQA without repeating keys
    scores = torch.einsum("bhgtd,bhsd->bhgts", q, k.to(dtype)).flatten(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)  # -inf - -inf would be NaN
    weights = (scores - top).exp()
    total = weights.sum(-1)  # at least 1 where anything is visible, else 0
    weights = weights.unflatten(1, (k.shape[1], -1))
    out = (
        torch.einsum("bhgts,bhsd->bhgtd", weights, v.to(dtype)).flatten(1, 2) / total.clamp_min(1)[..., None]
    )
    lse = (top[..., 0] + total.clamp_min(1).log()).masked_fill(total == 0, float("-inf"))
    return out, lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of slots, each given as (out, lse), into attention over their union.

    out [B, H, T, D], lse [B, H, T]. Exact: the share of a part in the joint softmax is exp(its lse - joint lse).
    """
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0).clamp_min(torch.finfo(lses.dtype).min)
    weights = (lses - top).exp()
    total = weights.sum(0)
    out = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    lse = (top + total.clamp_min(1).log()).masked_fill(total == 0, float("-inf"))
    return out / total.clamp_min(1)[..., None], lse
