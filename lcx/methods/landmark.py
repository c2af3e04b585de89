"""Landmark Attention: attention that picks blocks of the past through one token each (Mohtashami & Jaggi 2023, arXiv:2305.16300).

A block is `block_size` tokens, the last of them its landmark. A query attends to its own block and to the landmarks of
earlier blocks under one softmax; what a landmark receives is passed on to the tokens of its block by a softmax of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LcxError
from ..kernels import landmark as kernel

TILE = 128  # queries in a tile of the blocked form: small enough for a CPU's cache


def grouped_softmax(scores: Tensor, block_size: int) -> Tensor:
    """The definition (section 3.1, equations 1 to 4): scaled scores [..., Q, K] -> weights of the same shape.

    Queries are the last Q of the K positions; every block_size-th position, from block_size - 1 on, is a landmark. Each row
    sums to 1, what a query must not see gets 0, and so does every landmark. The memory is that of the scores.
    Raises LcxError if block_size is below 2 or there are more queries than keys.
    """
    Q, K = scores.shape[-2:]
    _check_block_size(block_size)
    if Q > K:
        raise LcxError(f"{Q} queries for {K} keys: queries are the last of the positions, give at most {K}")
    i = torch.arange(K - Q, K, device=scores.device)[:, None]
    j = torch.arange(K, device=scores.device)
    landmark = j % block_size == block_size - 1
    own, earlier = j // block_size == i // block_size, j // block_size < i // block_size
    own_token = own & ~landmark & (j <= i)  # its own block's landmark is ignored

    main = _softmax(scores.masked_fill(~(own_token | earlier & landmark), float("-inf")))
    blocks = F.pad(scores.masked_fill(landmark, float("-inf")), (0, -K % block_size), value=float("-inf"))
    blocks = blocks.unflatten(-1, (-1, block_size))
    inner = _softmax(blocks).flatten(-2)[..., :K]
    # The main probability of a landmark, at every token of its block. A last block without landmark is never earlier.
    gate = F.pad(main, (0, -K % block_size)).unflatten(-1, (-1, block_size))[..., -1:]
    gate = gate.expand_as(blocks).flatten(-2)[..., :K]
    return torch.where(own_token, main, torch.where(earlier & ~landmark, gate * inner, 0.0))


def _softmax(x: Tensor) -> Tensor:
    """softmax(-1), but 0 and not NaN where the caller has hidden everything, in the gradient as well."""
    nothing = (x == float("-inf")).all(-1, keepdim=True)
    return x.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax-weighted values by `grouped_softmax`, tile by tile: memory linear in the number of tokens, with gradients.

    q [B, H, Q, D], k and v [B, Hkv, K, D], rotated; queries are the last Q of the K positions; H is a multiple of Hkv
    (query head h reads head h // (H // Hkv)). scale: default D ** -0.5. mask: bool [B, K], False = a key that does not exist.
    documents: int64 [B, blocks], the document of each block of block_size tokens (the last may be incomplete); a query
    sees only blocks of its own document. Statistics are float32, for float64 input float64, whatever the input is.

    Returns out [B, H, Q, D] in the dtype of q; with return_lse also the log of the main softmax's denominator
    [B, H, Q] (no gradient flows through it), so that lcx.softmax.merge can join further blocks. A query that sees nothing
    gets out = 0 and lse = -inf. The values of landmarks are never used.
    Raises LcxError for shapes that do not fit.
    """
    _check_block_size(block_size)
    (B, H, Q, D), (Hkv, K) = q.shape, k.shape[1:3]
    blocks = -(-K // block_size)
    if Q > K or H % Hkv or k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        raise LcxError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit: give [B, H, Q, D] and twice "
            "[B, Hkv, K, D] with H a multiple of Hkv and Q at most K"
        )
    if mask is not None and (mask.shape != (B, K) or mask.dtype != torch.bool):
        raise LcxError(f"mask {list(mask.shape)} of {mask.dtype}: give bool [{B}, {K}]")
    if documents is not None and documents.shape != (B, blocks):
        raise LcxError(
            f"documents {list(documents.shape)}: give one number for each block, [{B}, {blocks}]; "
            "documents start at the start of a block"
        )
    scale = D**-0.5 if scale is None else scale
    if q.is_cuda and kernel.supports(q, k, v, block_size, mask, documents):
        out, lse = kernel.fused(q, k, v, block_size, scale)  # the same in one kernel
    else:
        out, lse = _Landmark.apply(q, k, v, block_size, scale, mask, documents)
    return (out, lse) if return_lse else out


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise LcxError(
            f"block_size {block_size} holds no token beside its landmark: use 2 or more, 64 is common"
        )


class _Landmark(torch.autograd.Function):
    """Forward and backward over tiles of queries. Nothing but q, k, v, out and one number per query is kept between them."""

    @staticmethod
    def forward(ctx, q, k, v, block_size, scale, mask, documents):
        with torch.autocast(q.device.type, enabled=False):
            job = _Tiles(q, k, v, block_size, scale, mask, documents)
            out, lse = torch.empty_like(job.q), job.q.new_empty(job.q.shape[:-1])
            for tile in job:
                weights, stats = job.weights(tile)
                out[:, :, tile.rows] = (weights.flatten(1, 2).flatten(2) @ job.v[:, : tile.end]).unflatten(
                    1, weights.shape[1:3]
                )
                lse[:, :, tile.rows] = stats.lse
        ctx.save_for_backward(q, k, v, out, mask, documents)
        ctx.settings = block_size, scale
        lse = lse.view(q.shape[:3])
        ctx.mark_non_differentiable(lse)
        return out.view(q.shape).to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        q, k, v, out, mask, documents = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            job = _Tiles(q, k, v, *ctx.settings, mask, documents)
            grad = grad.to(job.q.dtype).reshape(job.q.shape)
            dq, dk, dv = torch.empty_like(job.q), torch.zeros_like(job.k), torch.zeros_like(job.v)
            delta = (grad * out).sum(-1)[
                ..., None
            ]  # [N, G, Q, 1]: sum over keys of weight * gradient of weight
            for tile in job:
                weights, stats = job.weights(tile)
                g, qt = grad[:, :, tile.rows].flatten(1, 2), job.q[:, :, tile.rows].flatten(1, 2)
                w = weights.flatten(1, 2).flatten(2)
                dv[:, : tile.end] += w.mT @ g
                ds = (g @ job.v[:, : tile.end].mT).view_as(weights).mul_(weights)
                # Of earlier blocks, the softmax inside the block and the gate are two functions, each with its own mean.
                block, d = ds.sum(-1), delta[:, :, tile.rows]
                mean = torch.where(stats.earlier, block / stats.share.clamp_min(_tiny(block)), d)
                ds.addcmul_(weights, mean[..., None], value=-1)
                ds[..., -1] = torch.where(stats.earlier, block - stats.share * d, 0.0)
                ds = ds.flatten(1, 2).flatten(2)
                dq[:, :, tile.rows] = (ds @ job.k[:, : tile.end]).view(dq[:, :, tile.rows].shape)
                dk[:, : tile.end] += ds.mT @ qt
        length = k.shape[2]
        dk, dv = dk[:, :length].mul_(job.scale).view_as(k), dv[:, :length].view_as(v)
        dq = dq.mul_(job.scale).view_as(q)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


class _Tile:
    """Queries `rows`, at `positions`, and the keys before `end`, a whole number of blocks."""

    def __init__(self, start: int, stop: int, offset: int, block_size: int):
        self.rows = slice(start, stop)
        self.first, self.last = start + offset, stop + offset - 1
        self.end = (self.last // block_size + 1) * block_size


class _Stats:
    """earlier: bool, broadcastable to [N, G, T, blocks]; share: what each block gets of the query; lse [N, G, T]."""

    def __init__(self, earlier: Tensor, share: Tensor, lse: Tensor):
        self.earlier, self.share, self.lse = earlier, share, lse


class _Tiles:
    """q as [N, G, Q, D] and k, v as [N, K, D], in float32 or float64, N = B * Hkv and G = H // Hkv, K in whole blocks."""

    def __init__(self, q, k, v, block_size, scale, mask, documents):
        (B, H, Q, D), (Hkv, K) = q.shape, k.shape[1:3]
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.block_size, self.scale, self.offset, self.heads = block_size, scale, K - Q, Hkv
        self.q = q.to(dtype).reshape(B * Hkv, H // Hkv, Q, D)
        more = -K % block_size
        self.k, self.v = (F.pad(x.to(dtype), (0, 0, 0, more)).reshape(B * Hkv, -1, D) for x in (k, v))
        self.hidden = None if mask is None else ~F.pad(mask, (0, more)).unflatten(1, (-1, block_size))
        self.documents = documents
        self.size = max(1, TILE // block_size) * block_size

    def __iter__(self):
        count = self.q.shape[2]
        # The first tile ends where a block ends, so that no block is the own block of two tiles.
        start, stop = 0, min(count, self.size - self.offset % self.block_size)
        while start < count:
            yield _Tile(start, stop, self.offset, self.block_size)
            start, stop = stop, min(count, stop + self.size)

    def weights(self, tile: _Tile) -> tuple[Tensor, _Stats]:
        """Weights [N, G, T, blocks, block_size] of one tile of queries on the keys before tile.end."""
        B, device, inf = self.block_size, self.q.device, float("-inf")
        q = self.q[:, :, tile.rows]
        scores = (q.flatten(1, 2) * self.scale) @ self.k[:, : tile.end].mT
        scores = scores.view(*q.shape[:3], -1, B)
        blocks = scores.shape[3]
        own = (torch.arange(tile.first, tile.last + 1, device=device) // B)[:, None]
        j = torch.arange(blocks, device=device)
        earlier, own = j < own, j == own  # [T, blocks]
        # Only the tile's own blocks hold keys of the future.
        near = tile.first // B
        i = torch.arange(tile.first, tile.last + 1, device=device)[:, None, None]
        future = torch.arange(near * B, tile.end, device=device).view(-1, B) > i
        scores[..., near:, :].masked_fill_(future, inf)
        if self.hidden is not None:
            hidden = self.hidden[:, None, None, None, :blocks].expand(-1, self.heads, -1, -1, -1, -1)
            scores.masked_fill_(hidden.flatten(0, 1), inf)
        if self.documents is not None:
            same = (
                self.documents[:, tile.first // B : tile.last // B + 1, None]
                == self.documents[:, None, :blocks]
            )
            which = torch.arange(tile.first, tile.last + 1, device=device) // B - tile.first // B
            earlier = (
                (earlier & same[:, which])[:, None].expand(-1, self.heads, -1, -1).flatten(0, 1)[:, None]
            )
        gate = scores[..., -1].clone()
        scores[..., -1] = inf  # a landmark's value is never read
        top = scores.amax(-1).clamp_min(torch.finfo(scores.dtype).min)  # -inf - -inf would be NaN
        weights = scores.sub_(top[..., None]).exp_()
        total = weights.sum(-1)  # at least 1 where anything of the block is visible, else 0
        earlier = earlier & (total > 0)
        # What each block brings to the main softmax: its landmark's score, or, of the own block, its tokens themselves.
        main = torch.where(earlier, gate, torch.where(own & (total > 0), top, inf))
        most = main.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        e = (main - most).exp()
        share = torch.where(earlier, e, e * total)
        denominator = share.sum(-1, keepdim=True)
        lse = (most + denominator.log())[..., 0]
        share = share / denominator.clamp_min(_tiny(share))
        weights.mul_((share / total.clamp_min(1))[..., None])
        return weights, _Stats(earlier, share, lse)
