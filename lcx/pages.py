"""Where the slots of a memory live: pages on a device, in host memory, or in memory-mapped files."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

TIERS = ("device", "host", "disk")


class Page:
    """Room for P slots of every memory layer, allocated once and never moved.

    kv: {layer: [2, B, Hkv, P, D]}, keys, then values. mask: bool [B, P], or None while every slot exists for every
    row. slots: P. filled: slots written so far, by whichever fork. indexes: what lcx.lookup has built over the full page.
    """

    def __init__(self, kv: dict[int, Tensor]):
        self.kv, self.mask, self.filled, self.indexes = kv, None, 0, {}
        any_layer = next(iter(kv.values()))
        self.rows, self.slots, self.device = any_layer.shape[1], any_layer.shape[3], any_layer.device

    def write(self, at: int, kv: dict[int, tuple[Tensor, Tensor]], mask: Tensor | None) -> None:
        """Copy k, v [B, Hkv, n, D] of every layer, and mask [B, n], to the slots from `at` on."""
        for layer, pair in kv.items():
            for room, new in zip(self.kv[layer], pair, strict=True):
                room[:, :, at : at + new.shape[2]].copy_(new)
        if mask is not None:
            if self.mask is None:
                self.mask = torch.ones(self.rows, self.slots, dtype=torch.bool, device=self.device)
            self.mask[:, at : at + mask.shape[1]] = mask


@dataclass(frozen=True)
class Segment:
    """Slots start … stop-1 of a page. rows: the page's row behind each row of the memory; None = the same rows."""

    page: Page
    start: int
    stop: int
    rows: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, layer: int, device=None, which: slice = slice(0, 2)) -> Tensor:
        """Keys and values, or what `which` names of them, on `device`: [2, B or 1, Hkv, slots, D]."""
        # The whole page travels: it is contiguous, a part of it is not and would be copied twice.
        kv = self.page.kv[layer][which].to(device, non_blocking=True)[..., self.start : self.stop, :]
        return kv if self.rows is None else kv[:, self.rows.to(kv.device)]

    def mask(self, device=None) -> Tensor | None:
        """bool [B or 1, slots] on `device`, or None if every slot exists for every row."""
        if self.page.mask is None:
            return None
        mask = self.page.mask.to(device)[:, self.start : self.stop]
        return mask if self.rows is None else mask[self.rows.to(mask.device)]

    def select(self, rows: Tensor) -> Segment:
        """The same slots with the rows in another order. A page of one row serves every row as it is."""
        if self.page.rows == 1:
            return self
        return replace(self, rows=rows if self.rows is None else self.rows[rows])


def new_page(kv: dict[int, tuple[Tensor, Tensor]], slots: int, dtype: torch.dtype, tier: str, folder) -> Page:
    """An empty page for keys like those of `kv`. Raises OSError or RuntimeError if there is no room for it."""
    pages = {}
    for layer, (k, _) in kv.items():
        shape = (2, *k.shape[:2], slots, k.shape[3])
        if tier == "device":
            pages[layer] = torch.empty(shape, dtype=dtype, device=k.device)
        elif tier == "host":
            pages[layer] = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        else:
            pages[layer] = mapped(shape, dtype, folder)
    return Page(pages)


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    """A tensor in a memory-mapped file of its own, all blocks reserved: OSError now instead of SIGBUS later.

    The file loses its name at once, so its space is free again when the tensor is gone, even if the process is killed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    with tempfile.NamedTemporaryFile(dir=folder, prefix="lcx-memory-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:  # macOS: blocks are reserved by writing them
            for at in range(0, nbytes, 2**20):
                file.write(bytes(min(2**20, nbytes - at)))
            file.flush()
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
