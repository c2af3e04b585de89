"""The external memory of the Focused Transformer: keys and values of the past, attended to exactly or by lookup.

`lcx.softmax` has the attention over one tile and the joining of tiles under one softmax.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import lookup as lookups
from . import memory_file
from .errors import LcxError
from .pages import TIERS, Segment, new_page
from .softmax import attend, merge


class Memory:
    """Keys and values of the past for all memory layers (Focused Transformer, section 3.1).

    An unordered set of slots per row of the batch, in pages of `page_tokens` slots that are allocated on demand and
    never moved: appending costs the same however full the memory is.

    layers: indices of the memory layers. tier: where pages live: "device" (with the keys appended), "host" (CPU
    memory, pinned if there is CUDA; pages are copied to the queries one at a time) or "disk" (memory-mapped files in
    `folder`, else in the system's temporary folder; they vanish with the memory). dtype: of storage, None = that of
    the first keys. max_tokens: the most slots kept; the oldest slots go first, masked ones count, and what is
    allocated exceeds them by at most a page at each end. top_k: per query and head, attend only to the k slots of
    highest score. lookup: how these are found, "exact" or "faiss" (lcx.lookup; it keeps a float32 copy of the keys of
    full pages). page_tokens: of the next page; None = 1,024, with faiss 16,384, as every full page is indexed by itself.

    No gradient flows through a memory: what is appended is detached, and so is what `attend` returns.
    Raises LcxError, in one line, for bad settings, bad shapes, and when there is no room to grow.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        tier: str = "device",
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        top_k: int | None = None,
        lookup: str = "exact",
        page_tokens: int | None = None,
        folder: str | Path | None = None,
    ):
        self.layers, self.tier, self.dtype, self.folder = tuple(layers), tier, dtype, folder
        self.max_tokens, self.top_k, self.lookup = max_tokens, top_k, lookup
        self.page_tokens = (16384 if lookup == "faiss" else 1024) if page_tokens is None else page_tokens
        self.shape: tuple[int, int, int] | None = None  # rows, kv heads, head size: of the first append
        self._segments: deque[Segment] = deque()
        self._slots = 0
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise LcxError(f"memory layers {self.layers}: name at least one layer, and each once")
        if tier not in TIERS:
            raise LcxError(f"unknown tier {tier!r}: choose {', '.join(TIERS)}")
        if lookup not in ("exact", "faiss"):
            raise LcxError(f"unknown lookup {lookup!r}: choose exact or faiss")
        if dtype is not None and not dtype.is_floating_point:
            raise LcxError(f"a memory cannot hold {dtype}: choose float32, bfloat16 or float16")
        for name in ("max_tokens", "top_k", "page_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise LcxError(f"{name}={getattr(self, name)}: give at least 1")
        if lookup == "faiss":
            if top_k is None:
                raise LcxError('lookup="faiss" finds the k best slots: say how many, for example top_k=128')
            lookups.import_faiss()
        if folder is not None and not Path(folder).is_dir():
            raise LcxError(
                f"there is no folder {folder} for the memory's files: make it, or name another one"
            )

    def __len__(self) -> int:
        return self._slots

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stored slots, oldest first."""
        return tuple(self._segments)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one slot of one row: layers * 2 * Hkv * D * bytes of the dtype; 0 before the first append."""
        return len(self.layers) * 2 * math.prod(self.shape[1:]) * self.dtype.itemsize if self.shape else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored slots over all rows. What is allocated is this, rounded up to pages."""
        return sum(len(s) * s.page.rows for s in self._segments) * self.bytes_per_token

    @torch.no_grad()
    def append(self, kv: Mapping[int, tuple[Tensor, Tensor]], mask: Tensor | None = None) -> None:
        """Store T more slots: in all layers, or, if an error is raised, in none.

        kv: {layer: (k, v)}, each [B, Hkv, T, D], keys un-rotated. mask: bool [B, T], False = a slot that does not
        exist for that row. A memory of 1 row may be followed by B rows: all of them share what it holds.
        """
        shape = self._check_append(kv, mask)
        rows, heads, tokens, width = shape
        if tokens == 0:
            return
        dtype = self.dtype or kv[self.layers[0]][0].dtype
        if mask is not None and mask.all():
            mask = None
        done = max(
            0, tokens - (self.max_tokens or tokens)
        )  # of more than fits at once, the oldest are not stored
        written = []
        # Everything is allocated and written before anything that is stored is replaced by it.
        last = self._segments[-1] if self._segments else None
        if (
            last and last.rows is not None and len(last) < self.page_tokens
        ):  # rows in another order: copy this page
            page = self._new_page(kv, dtype)
            page.write(0, {i: tuple(last.read(i)) for i in self.layers}, last.mask())
            last = Segment(page, 0, len(last))
            page.filled = last.stop
        # Free slots of a page belong to the first fork that writes there; the others start a page of their own.
        room = last is not None and last.page.filled == last.stop < last.page.slots and last.page.rows == rows
        free = last.page.slots - last.stop if room else 0
        missing = math.ceil(max(0, tokens - done - free) / self.page_tokens)
        targets = [last] * room + [Segment(self._new_page(kv, dtype), 0, 0) for _ in range(missing)]
        for target in targets:
            n = min(target.page.slots - target.stop, tokens - done)
            part = {i: (k[:, :, done : done + n], v[:, :, done : done + n]) for i, (k, v) in kv.items()}
            target.page.write(target.stop, part, None if mask is None else mask[:, done : done + n])
            written.append(replace(target, stop=target.stop + n))
            done += n
        for segment in written:
            segment.page.filled = segment.stop
        self._slots += sum(map(len, written)) - (len(last) if room else 0)
        if room:
            self._segments.pop()
        self._segments.extend(written)
        self.shape, self.dtype = (rows, heads, width), dtype
        while self.max_tokens and (excess := self._slots - self.max_tokens) > 0:
            oldest = self._segments.popleft()
            if excess < len(oldest):
                self._segments.appendleft(replace(oldest, start=oldest.start + excess))
            self._slots -= min(excess, len(oldest))

    def _new_page(self, kv: Mapping[int, tuple[Tensor, Tensor]], dtype: torch.dtype):
        try:
            return new_page(kv, self.page_tokens, dtype, self.tier, self.folder)
        except (OSError, RuntimeError, MemoryError) as e:
            need = sum(2 * k[:, :, :1].numel() for k, _ in kv.values()) * self.page_tokens * dtype.itemsize
            reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise LcxError(
                f"no room for {need / 2**20:,.1f} MiB more of memory on the {self.tier} tier ({reason}); all "
                f"{len(self):,} slots stored so far are kept: free space, set max_tokens, or choose another tier"
            ) from e

    def _check_append(self, kv: Mapping[int, tuple[Tensor, Tensor]], mask: Tensor | None) -> torch.Size:
        if set(kv) != set(self.layers):
            raise LcxError(
                f"keys of layers {sorted(kv)} for a memory of {sorted(self.layers)}: give all of them"
            )
        shape = kv[self.layers[0]][0].shape
        for layer, pair in kv.items():
            if len(shape) != 4 or any(x.shape != shape for x in pair):
                found = " and ".join(str(list(x.shape)) for x in pair)
                raise LcxError(
                    f"layer {layer}: keys and values {found}: all layers need the same [B, Hkv, T, D]"
                )
        if mask is not None and (mask.shape != (shape[0], shape[2]) or mask.dtype != torch.bool):
            raise LcxError(f"mask {list(mask.shape)} of {mask.dtype}: give bool [{shape[0]}, {shape[2]}]")
        if self.shape and (self.shape[1:] != (shape[1], shape[3]) or self.shape[0] not in (1, shape[0])):
            raise LcxError(
                f"keys {list(shape)} for a memory of {self.shape[0]} rows, {self.shape[1]} kv heads of size "
                f"{self.shape[2]}: append what has the same sizes, or start another memory"
            )
        return shape

    @torch.no_grad()
    def attend(self, layer: int, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention of rotated queries q [B, H, T, D] over the memory alone, ready for `merge`.

        Returns out [B, H, T, D] and lse [B, H, T], in float32 (float64 for float64); out = 0 and lse = -inf where a
        row has no slot. A memory of 1 row answers any number of rows.
        """
        if self.top_k is None or self.top_k >= len(self):
            return self.dense(layer, q, scale)
        self._check_queries(layer, q)
        best = lookups.top_k(self, layer, q, scale, approximate=self.lookup == "faiss")
        return lookups.attend_slots(self, layer, *best)

    @torch.no_grad()
    def dense(self, layer: int, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """`attend` over every slot, whatever top_k is: tile by tile, so that scores of the whole are never held."""
        self._check_queries(layer, q)
        dtype = torch.promote_types(q.dtype, torch.float32)
        joint = torch.zeros_like(q, dtype=dtype), q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
        for (k, v), mask, _ in lookups.tiles(self, layer, q):
            joint = merge([joint, attend(q, k, v, scale, mask)])
        return joint

    def _check_queries(self, layer: int, q: Tensor) -> None:
        if layer not in self.layers:
            raise LcxError(f"layer {layer} has no memory: ask one of {self.layers}")
        if self.shape is None:
            return
        rows, heads, width = self.shape
        if q.shape[0] != rows != 1 or q.shape[1] % heads or q.shape[3] != width:
            raise LcxError(
                f"queries {list(q.shape)} for a memory of {rows} rows, {heads} kv heads of size {width}: "
                "give [rows, a multiple of the kv heads, T, size]"
            )

    def fork(self) -> Memory:
        """A memory with the same slots, shared and not copied. What either appends later, the other does not see."""
        twin = copy.copy(self)
        twin._segments = self._segments.copy()
        return twin

    def select(self, rows: Tensor) -> Memory:
        """A fork whose row i is this memory's row rows[i] (int64 [B]), as beam search needs it. Copies no slot."""
        twin = self.fork()
        if self.shape is None or self.shape[0] == 1:  # one row serves all
            return twin
        if rows.numel() == 0 or rows.min() < 0 or rows.max() >= self.shape[0]:
            raise LcxError(f"rows {rows.tolist()} of a memory of {self.shape[0]} rows: number them from 0")
        if len(rows) != self.shape[0] or (rows.cpu() != torch.arange(len(rows))).any():
            twin._segments = deque(s.select(rows) for s in self._segments)
            twin.shape = (len(rows), *self.shape[1:])
        return twin

    def save(self, path: str | Path, fingerprint: Mapping[str, Any]) -> Path:
        """Write the memory to one safetensors file, whole or not at all.

        fingerprint: what must be equal for the keys to mean the same (JSON values), such as sizes and a checksum of
        the weights. The header holds it, the settings and a sha256. Raises LcxError if the file cannot be written.
        """
        return memory_file.write(self, Path(path), fingerprint)

    @classmethod
    def load(
        cls, path: str | Path, fingerprint: Mapping[str, Any], *, device="cpu", **options: Any
    ) -> Memory:
        """Read a saved memory. options: settings of Memory that replace the saved ones (tier, top_k, folder, …).

        Raises LcxError if there is no such file, or if another model made it (its fingerprint differs), and
        CorruptFileError if it is damaged or no memory at all.
        """
        return memory_file.read(cls, Path(path), fingerprint, device, options)
