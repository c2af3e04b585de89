"""Crossbatch: the contrastive training of the Focused Transformer (Tworkowski et al. 2023, arXiv:2307.03170).

In a memory layer every entry of the batch (a chunk of a document) also attends to other entries: earlier chunks of
its own document (positives) and chunks of other documents (negatives). One softmax over all of them, no new weights,
the ordinary language-model loss. What the model learns is to give its attention to the positives.

"Context" below is an entry other than the local one, so a schedule of (positives, negatives) = (1, 7) is what the
method section of the paper calls d = 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..errors import LcxError
from ..softmax import attend, merge


def crossbatch_schedule(
    chunks_per_doc: int, context_range: int, stepping: bool = True
) -> list[tuple[int, int]]:
    """(positives, negatives) for each chunk of a document, as in the released code (paper, appendix A.2).

    A chunk looks back at most `context_range` entries in the batch: its own earlier chunks come first, chunks of the
    document before it after them. With stepping, chunk c looks back c * ceil((range + 1) / (chunks - 1)) at most, so
    that the first chunk sees nothing and learns to work without a memory.

    (4, 3) gives the mixture of LongLLaMA-3B: (0, 0) (1, 1) (2, 1) (3, 0). The 7B mixture of the paper,
    (0, 0) (1, 2) (2, 5) (3, 4), is no output of this formula: pass such a table to crossbatch_contexts directly.
    Raises LcxError if chunks_per_doc is below 1 or context_range below 0.
    """
    if chunks_per_doc < 1 or context_range < 0:
        raise LcxError(
            f"{chunks_per_doc} chunks per document and a range of {context_range} are not possible: "
            "use at least 1 chunk and a range of 0 or more"
        )
    step = math.ceil((context_range + 1) / max(chunks_per_doc - 1, 1))
    table = []
    for chunk in range(chunks_per_doc):
        seen = context_range
        if stepping and chunks_per_doc > 1:
            seen = min(chunk * step, context_range)
        positives = min(chunk, seen)
        table.append((positives, seen - positives))
    return table


def crossbatch_contexts(schedule: Sequence[tuple[int, int]], batch: int) -> torch.Tensor:
    """Which entries each entry of a batch sees besides itself: int64 [batch, C], -1 where there is none.

    Entry b is chunk b % len(schedule) of document b // len(schedule). Its positives are the chunks right before it. Its
    negatives are the entries before its document, nearest first; where the batch starts there are fewer of them than asked for.
    Looking around the end of the batch instead would leak: with two memory layers an entry would see a document that
    has seen the entry's own future.

    Raises LcxError if the batch is not a multiple of the schedule, or a chunk should see more positives than it has.
    """
    chunks = len(schedule)
    if not chunks or batch % chunks:
        raise LcxError(f"a batch of {batch} is no multiple of {chunks} chunks a document: change one of them")
    rows = []
    for entry in range(batch):
        chunk = entry % chunks
        positives, negatives = schedule[chunk]
        if not 0 <= positives <= chunk or negatives < 0:
            raise LcxError(
                f"chunk {chunk} of a document has {chunk} earlier chunks, it cannot see {positives} of them and "
                f"{negatives} others: correct this pair of the schedule"
            )
        first = entry - chunk
        own = [entry - 1 - i for i in range(positives)]
        others = [first - 1 - i for i in range(min(negatives, first))]
        rows.append(own + others)
    return _table(rows)


def lane_contexts(documents: int, d: int) -> torch.Tensor:
    """The contexts of the paper's small models (appendix B.3): int64 [2 * documents, d].

    The batch holds the previous chunk of every document, then the current chunk of every document. The current chunk of
    document i sees the previous chunks of the documents i (its positive), i + 1, … i + d - 1, around the end.
    Raises LcxError unless 0 <= d <= documents.
    """
    if not 0 <= d <= documents:
        raise LcxError(
            f"d = {d} needs as many documents in the batch, there are {documents}: change one of them"
        )
    current = (torch.arange(documents)[:, None] + torch.arange(d)) % max(documents, 1)
    return torch.cat([torch.full((documents, d), -1), current])


def crossbatch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    contexts: torch.Tensor,
    *,
    k_memory: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    block: int = 1024,
    return_mass: bool = False,
):
    """Attention of each entry over its own causal window and the whole of its contexts, under one softmax.

    q: [B, H, S, D] and k, v: [B, Hkv, S, D] at their positions in the window. k_memory: the same keys as other entries
    see them, un-rotated, that is at position 0 (default: k, for layers without positions). contexts: int64 [B, C]
    from crossbatch_contexts or lane_contexts. mask: bool [B, S], False on padding. scale: default 1/sqrt(D).

    Returns the output [B, H, S, D]; with return_mass also the share of the softmax that went to the window and to
    each context, [B, H, S, 1 + C]. Gradients reach the keys and values of positives and negatives alike (paper, section 3.2).
    Scores live for `block` context keys at a time: the backward pass computes them again. Where no mask and no mass is
    asked for, torch's fused kernel does the same on keys copied next to each other, about twice as fast on a CPU; float64
    always takes the way shown here.

    Raises LcxError if contexts names an entry that the batch does not have.
    """
    B, _, S, D = q.shape
    if _wrong(contexts, B):
        raise LcxError(
            f"contexts must name entries 0 … {B - 1} (or -1) for each of the {B} entries: use crossbatch_contexts or lane_contexts"
        )
    scale = D**-0.5 if scale is None else scale
    k_memory = k if k_memory is None else k_memory
    contexts = contexts.to(q.device)
    if mask is None and not return_mass and q.dtype != torch.float64:
        return _fused(q, k, v, contexts, k_memory, scale)
    real = torch.ones(B, S, dtype=torch.bool, device=q.device) if mask is None else mask.bool()

    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril() & real[:, None, None, :]
    out, lse = attend(q, k, v, scale, causal)
    pieces = [lse]
    step = 1 if return_mass else max(1, block // S)
    for some in contexts.split(step, dim=1) if contexts.numel() else ():
        rows = (some >= 0).any(1).nonzero()[:, 0]  # entries without a context here cost nothing
        seen = some[rows]
        visible = (real[seen] & (seen >= 0)[..., None]).flatten(1)[:, None, None, :]
        part = checkpoint(
            _attend_to,
            q[rows],
            k_memory,
            v,
            seen,
            scale,
            visible,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        pieces.append(lse.new_full(lse.shape, -math.inf).index_copy(0, rows, part[1]))
        joined = merge([(out[rows], lse[rows]), part])
        out, lse = out.index_copy(0, rows, joined[0].to(out.dtype)), lse.index_copy(0, rows, joined[1])
    if return_mass:
        return out, torch.stack(pieces, -1).softmax(-1)
    return out


def _fused(q, k, v, contexts, k_memory, scale):
    """The same by scaled_dot_product_attention, which holds no scores, on a copy of all keys that an entry sees."""
    S, out = q.shape[2], torch.empty_like(q)
    gqa = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    alone = (contexts < 0).all(1)
    parts = [(alone.nonzero()[:, 0], None), ((~alone).nonzero()[:, 0], contexts[~alone])]
    for rows, seen in parts:
        if not len(rows):
            continue
        if seen is None:
            part = scaled_dot_product_attention(q[rows], k[rows], v[rows], is_causal=True, **gqa)
        else:
            keys, values = (
                torch.cat([own[rows], other[seen].transpose(1, 2).flatten(2, 3)], 2)
                for own, other in ((k, k_memory), (v, v))
            )
            window = torch.ones(S, S, dtype=torch.bool, device=q.device).tril().expand(len(rows), 1, S, S)
            others = (seen >= 0).repeat_interleave(S, 1)[:, None, None].expand(-1, 1, S, -1)
            part = scaled_dot_product_attention(
                q[rows], keys, values, attn_mask=torch.cat([window, others], -1), **gqa
            )
        out = out.index_copy(0, rows, part.to(out.dtype))  # autocast may have made it bfloat16
    return out


def _attend_to(q, k, v, seen, scale, visible):
    """The attention of some entries to the entries `seen` [rows, c], joined along the keys."""
    k, v = (t[seen].transpose(1, 2).flatten(2, 3) for t in (k, v))  # [rows, Hkv, c * S, D]
    return attend(q, k, v, scale, visible)


def positive_share(mass: torch.Tensor, positives: int = 1) -> torch.Tensor:
    """r_d: how much of the attention on the contexts goes to the first `positives` of them (paper, section 3.3).

    mass: [..., 1 + C] as crossbatch_attention returns it; the local window does not count. Returns [...], 1/C if the
    attention is spread evenly (for one positive), 1 if nothing goes to other documents.
    """
    contexts = mass[..., 1:].float()
    return contexts[..., :positives].sum(-1) / contexts.sum(-1)


def _wrong(contexts: torch.Tensor, batch: int) -> bool:
    return len(contexts) != batch or bool(((contexts < -1) | (contexts >= batch)).any())


def _table(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(
        len(rows), width
    )
