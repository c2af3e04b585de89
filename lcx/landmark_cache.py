"""The cache of Landmark Attention: complete blocks in a memory, their landmark keys at hand, and the unfinished block."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from .errors import LcxError
from .memory import Memory

PAGE_TOKENS = 4096  # of the first page of the memory


class LandmarkCache(DynamicCache):
    """What one conversation has left behind, in all layers. Keys are rotated by their offset inside their block.

    memory: lcx.memory.Memory of whole blocks, None before the first call. landmarks: {layer: [B, Hkv, n, D]}, the keys of their last
    tokens, on the model's device wherever the blocks are. valid: bool [B, n], which blocks exist in each row. dropped: int64 [B], blocks that
    had to go. tail: {layer: (k, v)}, each [B, Hkv, t, D], and tail_length int64 [B], the tokens since the last landmark. seen: columns fed so far.
    traffic: bytes read so far, of "landmarks", "blocks" and "local" keys and values.
    """

    block_size: int
    memory: Memory
    landmarks: dict[int, Tensor]
    valid: Tensor | None
    dropped: Tensor | None
    tail: dict[int, tuple[Tensor, Tensor]]
    tail_length: Tensor | None
    seen: int
    traffic: Counter

    @classmethod
    def upgrade(cls, cache: DynamicCache, memory: Memory, block_size: int) -> LandmarkCache:
        """Turn an empty cache into one with `memory`, in place: generate and users hold on to the object they passed.

        Raises LcxError for a cache of another kind or one that was filled outside LandmarkAttention.
        """
        if isinstance(cache, cls) and hasattr(cache, "memory"):
            if cache.block_size != block_size:
                raise LcxError(
                    f"the cache has blocks of {cache.block_size} tokens, the model now uses {block_size}: start another cache"
                )
            return cache
        used = hasattr(cache, "memory")  # by another method, which keeps all it holds elsewhere
        if used or not isinstance(cache, DynamicCache) or DynamicCache.get_seq_length(cache):
            raise LcxError(
                "past_key_values must be empty or come from LandmarkAttention: leave it out, or use landmark.remember"
            )
        cache.__class__ = cls
        cache.block_size, cache.memory, cache.seen, cache.traffic = block_size, memory, 0, Counter()
        cache.landmarks, cache.tail = {}, {}
        cache.valid = cache.dropped = cache.tail_length = None
        return cache

    @property
    def blocks(self) -> int:
        """How many blocks the longest row can still open."""
        return 0 if self.valid is None else self.valid.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the conversation so far, without landmarks: generate cuts its input by it."""
        return getattr(self, "seen", 0)

    def open(self, rows: int, device) -> None:
        """Say how many rows the next input has. A cache of one row serves them all.

        Raises LcxError if it holds another number of rows.
        """
        if self.tail_length is None:
            self.tail_length = torch.zeros(rows, dtype=torch.int64, device=device)
            self.dropped = torch.zeros_like(self.tail_length)
            self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        held = len(self.tail_length)
        if held not in (1, rows):
            raise LcxError(f"the cache holds {held} rows, the input {rows}: give every row its own cache")
        if held < rows:
            self.tail_length, self.dropped = self.tail_length.expand(rows), self.dropped.expand(rows)
            self.valid = self.valid.expand(rows, -1)
            self.tail = {i: tuple(t.expand(rows, -1, -1, -1) for t in kv) for i, kv in self.tail.items()}

    def recent(self, top_k: int) -> Tensor:
        """int64 [B, k]: indices of the k newest blocks of each row, ascending, -1 where it has fewer; k = min(top_k, n)."""
        index = torch.where(self.valid, torch.arange(self.blocks, device=self.valid.device), -1)
        return index.topk(min(top_k, self.blocks), dim=-1).values.flip(-1)

    def ordinals(self) -> Tensor:
        """int64 [B, n]: the how-manyeth block of its row's text each one is, from 0."""
        return self.valid.cumsum(1) - 1 + self.dropped[:, None]

    def add(self, local: dict[int, tuple[Tensor, Tensor]], length: Tensor) -> None:
        """Take over the local keys and values of all layers [B, Hkv, L, D], of which `length` int64 [B] exist.

        Whole blocks go to the memory, what is left becomes the tail. If the memory cannot grow, nothing has changed.
        """
        size = self.block_size
        full = length // size
        count = int(full.max())
        if count:
            span = count * size
            there = torch.arange(count, device=full.device) < full[:, None]
            # Pages grow with the memory: few to look into, and at most a third allocated in vain.
            self.memory.page_tokens = max(1, max(PAGE_TOKENS, len(self.memory) // 2) // size) * size
            self.memory.append({i: (k[:, :, :span], v[:, :, :span]) for i, (k, v) in local.items()})
            for i, (k, _) in local.items():
                new, old = k[:, :, size - 1 : span : size], self.landmarks.get(i)
                if old is not None:
                    new = torch.cat([old.expand(len(new), -1, -1, -1), new], 2)
                self.landmarks[i] = new
            self.valid = torch.cat([self.valid, there], 1)
            if gone := self.valid.shape[1] - len(self.memory) // size:
                self.dropped = self.dropped + self.valid[:, :gone].sum(1)
                self.valid = self.valid[:, gone:]
                self.landmarks = {i: k[:, :, gone:] for i, k in self.landmarks.items()}
        self.tail_length = length - full * size
        width, first = int(self.tail_length.max()), full * size
        same = bool((first == first[0]).all())
        at = (first[:, None] + torch.arange(width, device=first.device)).clamp(
            max=next(iter(local.values()))[0].shape[2] - 1
        )

        def end(x):
            if same:
                return x[:, :, int(first[0]) : int(first[0]) + width].clone()
            return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        self.tail = {i: (end(k), end(v)) for i, (k, v) in local.items()}

    def fetch(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, k, block_size, D] of blocks [B, H, T, k] (indices, -1 = none: something), on its device.

        Only these blocks are read, wherever they are. Query head h reads key head h // (H // Hkv).
        """
        size, (rows, heads), segments = self.block_size, blocks.shape[:2], self.memory.segments
        device, wanted, kv_heads = blocks.device, blocks.clamp(min=0).flatten(), self.memory.shape[1]
        each = torch.arange(rows * heads, device=device).repeat_interleave(blocks[0, 0].numel())
        row, head = each // heads, each % heads // (heads // kv_heads)
        sizes = [[len(s) // size, s.stop // size, s.page.slots // size] for s in segments]
        held, stop, room = torch.tensor(sizes, device=device).T
        ends = held.cumsum(0)
        page = torch.bucketize(wanted, ends, right=True)
        if any(s.rows is not None or s.page.rows < rows for s in segments):
            behind = [
                s.rows if s.rows is not None else torch.arange(rows).clamp(max=s.page.rows - 1)
                for s in segments
            ]
            row = torch.stack([r.to(device) for r in behind])[page, row]
        # A page is [2, rows, Hkv, slots, D] and contiguous: the keys of a block are one row of `table`, its values one of its second half.
        place = (row * kv_heads + head) * room[page] + wanted - ends[page] + stop[page]
        touched, out = page.unique().tolist(), None
        for p in touched:
            kv = segments[p].page.kv[layer]
            table = kv.view(-1, size * kv.shape[4])
            some = (page == p).nonzero()[:, 0] if len(touched) > 1 else slice(None)
            keys = place[some].to(kv.device)
            got = table.index_select(0, torch.cat([keys, keys + len(table) // 2])).to(device)
            if len(touched) == 1:
                out = got
            else:
                out = got.new_empty(2 * len(wanted), got.shape[1]) if out is None else out
                out.index_copy_(0, torch.cat([some, some + len(wanted)]), got)
        out = out.view(2, *blocks.shape, size, -1)
        self.traffic["blocks"] += int((blocks >= 0).sum()) * 2 * size * out.shape[-1] * out.element_size()
        return out[0], out[1]

    def fork(self) -> LandmarkCache:
        """A cache that starts with all this one holds. The memory is shared, not copied; neither sees later tokens of the other."""
        twin = copy.copy(self)
        twin.memory = self.memory.fork()
        twin.landmarks, twin.tail, twin.traffic = dict(self.landmarks), dict(self.tail), Counter(self.traffic)
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.tail_length), device=self.tail_length.device)
        self._rows(rows.repeat_interleave(repeats))

    def _rows(self, rows: Tensor) -> None:
        self.memory = self.memory.select(rows)
        self.landmarks = {i: k if len(k) == 1 else k[rows] for i, k in self.landmarks.items()}
        self.tail = {i: (k[rows], v[rows]) for i, (k, v) in self.tail.items()}
        self.valid, self.dropped, self.tail_length = (
            self.valid[rows],
            self.dropped[rows],
            self.tail_length[rows],
        )


@dataclass(frozen=True)
class Layout:
    """One chunk of every row: where its tokens come from and where they stand.

    positions: int64 [B, T], place in the local context, from 0 at the start of the unfinished block. columns: int64 [B, T], column of
    the input, of a landmark that of the token before it, -1 where a row has no token. landmark: bool [B, T]. length: int64 [B], tokens of the
    local context up to the end of this chunk, -1 for a row that has none in it. uniform: every row has the same positions.
    """

    positions: Tensor
    columns: Tensor
    landmark: Tensor
    length: Tensor
    uniform: bool

    @property
    def real(self) -> Tensor:
        return self.columns >= 0


def chunks(real: Tensor, tail_length: Tensor, block_size: int, window: int | None) -> list[Layout]:
    """Insert landmarks into the real tokens of each row, bool [B, N], and cut where `window` local tokens are full.

    Blocks are counted from the row's unfinished block, of which tail_length int64 [B] tokens are known. None: one chunk.
    """
    counts, regular = real.sum(1), block_size - 1
    total = tail_length + counts
    total = total + total // regular  # a landmark follows at once when its block is full
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)  # real columns first, in their order
    window = window or max(int(total.max()), 1)
    layouts, device = [], real.device
    for start in range(0, int(total.max()), window):
        first = (tail_length if start == 0 else torch.full_like(total, start))[:, None]
        stop = total.clamp(max=start + window)[:, None]
        width = int((stop - first).max())
        if width <= 0:
            continue
        at = first + torch.arange(
            width, device=device
        )  # counted from the unfinished block of the first chunk
        there = at < stop
        at = torch.minimum(at, (stop - 1).clamp(min=start))
        landmark = at % block_size == block_size - 1
        # How many of the row's new tokens stand before; of a landmark, one less: it shares the column of the last.
        rank = at - at // block_size - tail_length[:, None] - landmark.long()
        columns = order.gather(1, rank.clamp(0, real.shape[1] - 1))
        layouts.append(
            Layout(
                positions=at - start,
                columns=torch.where(there, columns, -1),
                landmark=landmark & there,
                length=torch.where(stop > first, stop - start, -1)[:, 0],
                uniform=bool((first == first[0]).all() and (stop == stop[0]).all()),
            )
        )
    return layouts
