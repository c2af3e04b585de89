"""The cache of a model with a memory: the local tokens of all layers, as transformers keeps them, and the memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from .errors import LcxError
from .memory import Memory


class FocusedCache(DynamicCache):
    """Local keys and values (un-rotated in memory layers), which of them exist in each row, and the memory.

    memory: lcx.memory.Memory, None without memory layers. mask: bool [B, L], the local tokens that exist. next_position: int64 [B], the position
    of the next token in the layers without memory. seen: tokens of this conversation so far, without what `remember`
    had put into the memory of a forked cache.
    """

    memory: Memory | None
    mask: torch.Tensor | None
    next_position: torch.Tensor | None
    seen: int

    @classmethod
    def upgrade(cls, cache: DynamicCache, memory: Memory | Callable | None) -> FocusedCache:
        """Turn an empty cache into one with a memory, in place: generate and users hold on to the object they passed.

        Raises LcxError for a cache of another kind or one that was filled outside FocusedAttention.
        """
        if isinstance(cache, cls) and hasattr(cache, "memory"):
            return cache
        used = hasattr(cache, "memory")  # by another method, which keeps all it holds elsewhere
        if used or not isinstance(cache, DynamicCache) or DynamicCache.get_seq_length(cache):
            raise LcxError(
                "past_key_values must be empty or come from FocusedAttention: leave it out, or use focused.remember"
            )
        DynamicCache.__init__(cache)  # plain layers: the windows are ours
        cache.__class__ = cls
        cache.memory = memory() if callable(memory) else memory
        cache.mask = cache.next_position = None
        cache.seen, cache._inside = 0, False
        return cache

    @contextmanager
    def local(self) -> Iterator[None]:
        """Inside, the cache counts only its local tokens: for the decoder, which knows nothing of the memory."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the conversation so far (generate cuts its input by it), local ones inside `local()`."""
        inside = getattr(self, "_inside", True)
        return super().get_seq_length(layer_idx) if inside else self.seen

    def local_positions(self) -> torch.Tensor:
        """int64 [B, L]: position of each local token in the memory layers, from 0 at the first of each row."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def extend(self, real: torch.Tensor) -> torch.Tensor:
        """Count new tokens, real bool [B, T]. Returns their positions [B, T] in the layers without memory."""
        B = len(real)
        if self.mask is None:
            self.mask = real.new_zeros(B, 0)
            self.next_position = torch.zeros(B, dtype=torch.int64, device=real.device)
        if len(self.mask) != B:
            raise LcxError(
                f"the cache holds {len(self.mask)} rows, the input {B}: give every row its own cache"
            )
        positions = self.next_position[:, None] + (real.cumsum(1) - 1).clamp(min=0)
        self.next_position = self.next_position + real.sum(1)
        self.mask = torch.cat([self.mask, real], 1)
        return positions

    def make_room(self, focused, new: torch.Tensor | None) -> None:
        """Move local tokens into memory in the rows whose window would overflow by `new` [B] tokens (None: all rows).

        flush: everything local leaves. roll: the oldest, as many as needed. Layers without memory drop them.
        """
        if self.mask is None or not self.mask.shape[1]:
            return
        settings = focused.settings
        count = self.mask.sum(1)
        if new is None:
            new = torch.full_like(count, settings.window + 1)
        excess = count + new - settings.window
        if not bool((excess > 0).any()):
            return
        focused.need_layers()
        if settings.overflow == "flush":
            leaving = self.mask & (excess > 0)[:, None]
            self.next_position = torch.where(excess > 0, 0, self.next_position)
        else:
            leaving = self.mask & (self.mask.cumsum(1) <= excess[:, None])
        some = leaving.any(0).nonzero()[:, 0]
        span = slice(int(some[0]), int(some[-1]) + 1)
        entries = {}
        for i in settings.memory_layers:
            k, v = self.layers[i].keys, self.layers[i].values
            entries[i] = k[:, :, span], v[:, :, span]
        self.memory.append(entries, leaving[:, span])
        self.mask = self.mask & ~leaving
        left = self.mask.any(0).nonzero()[:, 0]
        first = int(left[0]) if len(left) else self.mask.shape[1]
        self.mask = self.mask[:, first:]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    def fork(self) -> FocusedCache:
        """A cache that starts with all this one holds. The memory is shared, not copied; neither sees later tokens of the other."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.memory = self.memory and self.memory.fork()
        return twin

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._rows(rows)

    def _rows(self, rows: torch.Tensor) -> None:
        self.memory = self.memory.select(rows)
        self.mask, self.next_position = self.mask[rows], self.next_position[rows]


def fingerprint(model, memory_layers) -> dict[str, str]:
    """What must be equal for a stored memory to mean the same: sizes, memory layers, and the weights that make keys and values."""
    config, digest = model.config, hashlib.sha256()
    for i in memory_layers:
        attention = model.model.layers[i].self_attn
        for projection in (attention.k_proj, attention.v_proj):
            digest.update(projection.weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "family": config.model_type,
        "hidden_size": str(config.hidden_size),
        "num_hidden_layers": str(config.num_hidden_layers),
        "memory_layers": ",".join(map(str, memory_layers)),
        "weights": digest.hexdigest()[:16],
    }
