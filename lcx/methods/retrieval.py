"""Block retrieval of Landmark Attention: score blocks, choose the best, give them places, attend to them (sections 3.2, 3.2.1).

Blocks lie in a cache, oldest first, their keys rotated by their offset inside the block. Where a block stands is then a matter
of the query alone: q at position P sees a block d blocks before the local context as R(P + d * block_size) q.
`turned` [B, H, T, k + 1, D] holds it for d = 1 … k + 1: no other d occurs, whatever the length of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Whose best blocks are fetched: those of each query of each head (as in training), of each head for a whole chunk of
# queries, or of each query for all heads (section 4.1, Table 2).
GRANULARITIES = ("head_and_token", "head", "token")

NEVER = float("-inf")


def score_blocks(turned: Tensor, landmarks: Tensor, recent: Tensor, scale: float) -> Tensor:
    """Scores of every query on every cached landmark, [B, H, T, n].

    turned [B, H, T, k + 1, D]; landmarks [B or 1, Hkv, n, D]; recent int64 [B or 1, k], indices of each row's k newest blocks in
    ascending order, -1 where it has fewer. These are scored at their true distance; all older blocks share the distance of
    k + 1 blocks, so that no distance exceeds what was trained.
    """
    (B, H, T, _, D), heads = turned.shape, landmarks.shape[1]
    dtype = torch.promote_types(turned.dtype, torch.float32)
    turned, landmarks = turned.to(dtype) * scale, landmarks.to(dtype)
    far = turned[..., -1, :].reshape(B, heads, -1, D)  # GQA: the heads of a group as more queries
    scores = (far @ landmarks.mT).view(B, H, T, -1)
    # Where a row has fewer, its newest block is written once more.
    known = torch.where(recent < 0, recent[:, -1:], recent).clamp(min=0)
    rows = max(len(known), len(landmarks))
    keys = landmarks.expand(rows, -1, -1, -1).gather(2, known[:, None, :, None].expand(rows, heads, -1, D))
    near = turned[..., :-1, :].flip(3).unflatten(1, (heads, -1))  # from k blocks back to 1
    near = torch.einsum("bhgtkd,bhkd->bhgtk", near, keys.expand(B, -1, -1, -1)).flatten(1, 2)
    near = torch.where(recent[:, None, None] < 0, near[..., -1:], near)
    return scores.scatter_(-1, known[:, None, None].expand_as(near), near)


def choose_blocks(scores: Tensor, valid: Tensor, top_k: int, granularity: str = GRANULARITIES[0]) -> Tensor:
    """The blocks to fetch: int64 [B, H, T, k], ascending, -1 first where a row has fewer; H or T is 1 where all share them.

    scores [B, H, T, n], -inf at queries that do not exist; valid bool [B or 1, n]; k = min(top_k, n). With "head" and "token"
    what is compared are probabilities among the cached blocks, the largest over the chunk's queries or over the heads.
    Ties go to the newest block: in layer 0 all landmarks are the same vector. Scores within 1e-5 (float64: 1e-8) of their size
    are tied, so that rounding does not decide.
    """
    scores, size = scores.masked_fill(~valid[:, None, None, :], NEVER), 1.0
    if granularity != "head_and_token":
        dim = 2 if granularity == "head" else 1
        size = scores.masked_fill(scores == NEVER, 0.0).abs().amax((dim, -1), keepdim=True).clamp_min(1)
        scores = scores.log_softmax(-1).nan_to_num(NEVER, neginf=NEVER).amax(dim, keepdim=True)
    n = scores.shape[-1]
    k = min(top_k, n)
    best = scores.topk(min(k + 1, n), dim=-1)
    least, chosen = best.values[..., k - 1 : k], best.indices[..., :k]
    margin = least.abs().clamp_min(size) * (1e-8 if scores.dtype == torch.float64 else 1e-5)
    tied = ((best.values[..., k:] >= least - margin) & (least > NEVER)).any(-1)
    if tied.any():  # hardly ever, but in layer 0
        s, least, margin = scores[tied], least[tied], margin[tied]
        # First what is better for sure, then the newest of those that are as good.
        order = torch.arange(n, device=s.device) + n * (s > least + margin)
        chosen[tied] = order.masked_fill_(s < least - margin, -1).topk(k, dim=-1).indices
    return chosen.masked_fill(best.values[..., :k] == NEVER, -1).sort(-1).values


def distances(blocks: Tensor, recent: Tensor) -> Tensor:
    """How many blocks before the local context each chosen block is placed: int64 like blocks [B, H, T, k].

    The stingy allocation of section 3.2.1: the j-th of k chosen blocks lies k - j blocks back if it is one of the k newest
    (`recent`, see score_blocks), else one more. Order is kept, exactly one of k + 1 places stays empty (all of the
    newest: the first), and the k newest themselves get their true places.
    """
    k = blocks.shape[-1]
    back = k - torch.arange(k, device=blocks.device)
    old = blocks < recent[:, :1, None, None].clamp(min=0)
    return back + old


def attend_blocks(
    turned: Tensor, k: Tensor, v: Tensor, blocks: Tensor, recent: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Grouped softmax over fetched blocks alone: (out [B, H, T, D], lse [B, H, T]), to be merged with the local context.

    k, v [B, H, T or 1, k, block_size, D], the blocks named by blocks [B, H, T or 1, k] (-1 = none) with their landmarks,
    which gate them at their new places (so a gate is not the score by which the block was chosen).
    """
    dtype = torch.promote_types(torch.promote_types(k.dtype, turned.dtype), torch.float32)
    T = turned.shape[2]
    back = (distances(blocks, recent) - 1).expand(*turned.shape[:3], -1)
    q = turned.to(dtype).gather(3, back[..., None].expand(-1, -1, -1, -1, turned.shape[-1])) * scale
    if k.shape[2] == T:  # every query has its own blocks
        scores = (k.to(dtype) @ q[..., None])[..., 0]  # [B, H, T, k, block_size]
    else:  # all queries share them
        scores = (q.transpose(2, 3) @ k[:, :, 0].to(dtype).mT).transpose(2, 3)
    gate = scores[..., -1].masked_fill(blocks < 0, float("-inf"))
    lse = gate.logsumexp(-1)
    share = (gate - lse.clamp_min(torch.finfo(dtype).min)[..., None]).exp()
    # [B, H, T, k, block_size], the landmark's own weight 0: cheaper than a copy of the values without it.
    inner = torch.nn.functional.pad(scores[..., :-1].softmax(-1) * share[..., None], (0, 1))
    v = v.to(dtype)
    if v.shape[2] == T:
        out = (inner.flatten(3)[..., None, :] @ v.flatten(3, 4))[..., 0, :]
    else:
        out = inner.flatten(3) @ v[:, :, 0].flatten(2, 3)
    return out, lse
