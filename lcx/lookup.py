"""Attending only to the k best slots of a memory: found exactly, or approximately through faiss.

The approximate index is an inverted file (faiss IndexIVFFlat, inner product): k-means sorts the keys of a page into
one list per 64 keys, and a query looks only into the sqrt(lists) lists whose centres score highest. One index per full
page, row and kv head: a page never changes again, so its index is shared by forks, dropped with the page, and never
rebuilt while the memory grows. The last, unfilled page is searched exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import LcxError

SCORES = 2**24  # the most scores computed at once (64 MiB in float32)


def import_faiss():
    """The faiss module. Raises LcxError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise LcxError(
            'lookup="faiss" needs the package faiss: run `python -m pip install faiss-cpu`'
        ) from None
    return faiss


def tiles(memory, layer: int, q: Tensor, which: slice = slice(0, 2), segments=None):
    """(keys and values [2, B or 1, Hkv, s, D], mask [B or 1, 1, 1, s] or None, number of the first slot) per tile."""
    size = max(1, SCORES // q[..., 0].numel())
    for first, segment in numbered(memory) if segments is None else segments:
        kv, mask = segment.read(layer, q.device, which), segment.mask(q.device)
        for a in range(0, len(segment), size):
            yield (
                kv[..., a : a + size, :],
                None if mask is None else mask[:, None, None, a : a + size],
                first + a,
            )


def numbered(memory):
    """(number of its first slot, segment): slots are numbered from the oldest that is stored."""
    first = 0
    for segment in memory.segments:
        yield first, segment
        first += len(segment)


def top_k(memory, layer: int, q: Tensor, scale: float, approximate: bool) -> tuple[Tensor, Tensor]:
    """The memory.top_k highest scaled scores per query and head, with slot numbers: both [B, H, T, k].

    Where a query has fewer slots (or faiss finds fewer), the rest has score -inf.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, memory.dtype), torch.float32)
    q, k = q.to(dtype) * scale, min(memory.top_k, len(memory))
    best = q.new_full((*q.shape[:3], k), float("-inf")), q.new_zeros((*q.shape[:3], k), dtype=torch.long)

    waiting = []  # one topk over many tiles is far faster than one per tile
    exact = []
    for first, segment in numbered(memory):
        if approximate and segment.stop == segment.page.slots:
            best = keep_best(best, *search(segment, layer, q, k, first))
        else:
            exact.append((first, segment))
    for kv, mask, first in tiles(memory, layer, q, slice(0, 1), exact):
        grouped = q.unflatten(1, (kv.shape[2], -1))
        scores = torch.einsum("bhgtd,bhsd->bhgts", grouped, kv[0].to(dtype)).flatten(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        waiting.append((scores, torch.arange(first, first + scores.shape[-1], device=q.device)))
        if sum(scores.numel() for scores, _ in waiting) >= SCORES:
            best, waiting = keep_best(best, *(torch.cat(x, -1) for x in zip(*waiting, strict=True))), []
    if waiting:
        best = keep_best(best, *(torch.cat(x, -1) for x in zip(*waiting, strict=True)))
    return best


def keep_best(best: tuple[Tensor, Tensor], scores: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of `best` (scores and slots, [..., k]) and of more scores [..., n] of slots [..., n] or [n]."""
    k = best[0].shape[-1]
    scores, at = torch.cat([best[0], scores], -1).topk(k, -1, sorted=False)
    new = (at - k).clamp_min(0)
    slots = slots[new] if slots.dim() == 1 else slots.gather(-1, new)
    return scores, torch.where(at < k, best[1].gather(-1, at.clamp_max(k - 1)), slots)


def attend_slots(memory, layer: int, scores: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the found scores [B, H, T, k] alone; only the values of these slots are read.

    Returns out [B, H, T, D] and lse [B, H, T], 0 and -inf where nothing was found.
    """
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    out = scores.new_zeros(lse.numel(), memory.shape[2])
    query = torch.arange(lse.numel(), device=lse.device).view(*lse.shape, 1).expand_as(slots)
    for first, segment in numbered(memory):
        here = (slots >= first) & (slots < first + len(segment)) & (weights > 0)
        row, head, _, _ = here.nonzero(as_tuple=True)
        if segment.rows is not None:
            row = segment.rows.to(row.device)[row]
        elif segment.page.rows == 1:
            row = torch.zeros_like(row)
        head = head // (slots.shape[1] // memory.shape[1])
        values = segment.page.kv[layer][1]
        at = (row, head, slots[here] - first + segment.start)
        found = values[tuple(i.to(values.device) for i in at)].to(out)
        out.index_add_(0, query[here], weights[here][:, None] * found)
    return out.view(*lse.shape, -1), lse


def build(page, layer: int) -> list:
    """One faiss index per row and kv head over the keys of a full page: [B][Hkv], None where every slot is masked."""
    faiss = import_faiss()
    keys = page.kv[layer][0].float().cpu()
    rows = []
    for row in range(page.rows):
        ids = torch.arange(keys.shape[2]) if page.mask is None else page.mask[row].cpu().nonzero()[:, 0]
        heads = []
        for head in keys[row][:, ids].contiguous().numpy() if len(ids) else []:
            lists = max(1, len(ids) // 64)
            index = faiss.index_factory(keys.shape[3], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
            index.train(head)
            index.add_with_ids(head, ids.numpy())
            index.nprobe = math.ceil(math.sqrt(lists))
            heads.append(index)
        rows.append(heads or [None] * keys.shape[1])
    return rows


def search(segment, layer: int, q: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """Approximate top-k of scaled queries q [B, H, T, D] in a full page: scores and slot numbers [B, H, T, k]."""
    faiss = import_faiss()
    if layer not in segment.page.indexes:
        segment.page.indexes[layer] = build(segment.page, layer)
    indexes = segment.page.indexes[layer]
    scores = torch.full((*q.shape[:3], k), float("-inf"))
    slots = torch.full((*q.shape[:3], k), -1)
    group = q.shape[1] // len(indexes[0])
    for b, queries in enumerate(q.float().cpu()):
        row = int(segment.rows[b]) if segment.rows is not None else b % segment.page.rows
        for h, index in enumerate(indexes[row]):
            if index is None:
                continue
            options = None
            if segment.start:  # its first slots have been evicted
                options = faiss.SearchParametersIVF(
                    sel=faiss.IDSelectorRange(segment.start, segment.stop), nprobe=index.nprobe
                )
            heads = slice(h * group, (h + 1) * group)
            flat = queries[heads].reshape(-1, q.shape[3]).numpy()
            found, ids = index.search(flat, k, params=options)
            scores[b, heads] = torch.from_numpy(found).view(group, -1, k)
            slots[b, heads] = torch.from_numpy(ids).view(group, -1, k)
    scores = scores.masked_fill(slots < 0, float("-inf")).to(q)
    return scores, (slots.clamp_min(segment.start) - segment.start + first).to(q.device)


@torch.no_grad()
def lookup_error(memory, layer: int, q: Tensor, scale: float) -> dict[str, float]:
    """What a memory's lookup of the top k misses, for queries q [B, H, T, D].

    recall: the share of the exact top k that it finds. error, exact_error: relative error of the output of this
    lookup, and of exact top-k, against attention to the whole memory: |out - dense| / |dense| over all queries.
    Raises LcxError if the memory has no top_k or is empty.
    """
    if memory.top_k is None or not len(memory):
        raise LcxError("nothing to measure: give the memory a top_k, and store something in it")
    dense, _ = memory.dense(layer, q, scale)
    exact = top_k(memory, layer, q, scale, approximate=False)
    found = top_k(memory, layer, q, scale, memory.lookup == "faiss")
    wanted, offered = (slots.masked_fill(scores.isneginf(), -1) for scores, slots in (exact, found))
    # Slot numbers as sorted lists: a search in them takes no k x k table.
    offered = offered.sort(-1).values
    at = torch.searchsorted(offered, wanted).clamp_max(offered.shape[-1] - 1)
    hits = (offered.gather(-1, at) == wanted) & (wanted >= 0)

    def error(best: tuple[Tensor, Tensor]) -> float:
        return ((attend_slots(memory, layer, *best)[0] - dense).norm() / dense.norm()).item()

    recall = hits.sum().item() / max(1, (wanted >= 0).sum().item())
    return {"recall": recall, "error": error(found), "exact_error": error(exact)}
