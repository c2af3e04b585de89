"""Attention in pieces: over one tile with its log-sum-exp, and several tiles joined under one softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention over one tile of keys and values, with the log-sum-exp that `merge` needs.

    q [B, H, T, D]; k, v [B or 1, Hkv, S, D]; H is a multiple of Hkv, query head h reads head h // (H // Hkv).
    mask: bool, broadcastable to [B, H, T, S], True = visible; or causal, for T = S. Differentiable in q, k and v.
    Returns out [B, H, T, D] and lse [B, H, T], in float32 or, for float64 input, float64.
    A query that sees nothing gets out = 0 and lse = -inf.
    """
    if mask is None and (done := flash(q, k, v, scale, causal)):
        return done
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    # Under autocast the products would come out in bfloat16, and their differences in the exponent with them.
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        q = (
            q.to(dtype).unflatten(1, (k.shape[1], -1)) * scale
        )  # [B, Hkv, H/Hkv, T, D]: GQA without repeating keys
        scores = torch.einsum("bhgtd,bhsd->bhgts", q, k.to(dtype)).flatten(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        top = (
            scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
        )  # -inf - -inf would be NaN
        weights = (scores - top).exp()
        total = weights.sum(-1)  # at least 1 where anything is visible, else 0
        weights = weights.unflatten(1, (k.shape[1], -1))
        out = (
            torch.einsum("bhgts,bhsd->bhgtd", weights, v.to(dtype)).flatten(1, 2)
            / total.clamp_min(1)[..., None]
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


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor] | None:
    """torch's fused CPU kernel, four times as fast: out and lse as `attend` returns them, or None where the kernel does not apply.

    It does on a CPU, in float32 and without gradients: no gradient flows through its log-sum-exp. Several query heads of one
    key head, and several rows of queries on one row of keys, are laid behind each other as more queries.
    """
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    dtype = torch.promote_types(q.dtype, k.dtype)
    if op is None or wants_grad or q.device.type != "cpu" or dtype != torch.float32 or not k.shape[2]:
        return None
    (B, H, T, D), (rows, heads) = q.shape, k.shape[:2]
    shared = rows == 1 and B > 1
    if causal and (shared or heads != H):
        return None
    q = q.to(dtype).reshape(B, heads, H // heads * T, D)
    if shared:
        q = q.transpose(0, 1).reshape(1, heads, -1, D)
    out, lse = op(q, k.to(dtype), v.to(dtype), 0.0, causal, attn_mask=None, scale=scale)
    if shared:
        out, lse = out.view(heads, B, -1, D).transpose(0, 1), lse.view(heads, B, -1).transpose(0, 1)
    return out.reshape(B, H, T, D), lse.reshape(B, H, T)
