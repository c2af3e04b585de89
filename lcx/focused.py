"""FocusedAttention: a long memory in a few layers of an unmodified model (paper, sections 3.1 and 4; LongLLaMA).

A long input runs through the model window by window. In the memory layers, the keys and values of every finished window go into
a memory, un-rotated, that is at position 0, and all later windows attend to it under the same softmax as to
themselves. All other layers see their window and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .attention import Heads, attach, causal_lm, check_free, replaced
from .errors import LcxError
from .focused_cache import FocusedCache, fingerprint
from .long_model import LongModel
from .memory import Memory
from .methods.focused import crossbatch_attention
from .methods.rope import rotate
from .softmax import attend, merge
from .windows import Piece, collect, real_tokens, split

OVERFLOW = ("flush", "roll")


@dataclass(frozen=True)
class FocusedAttention:
    """`with FocusedAttention(memory_layers=(6, 12, 18), window=2048)(model) as focused:` gives the model a memory.

    memory_layers: indices from 0. window: tokens of the local context, default (and at most) the model's own window.
    last_context: how many of the last tokens of a prompt stay local (default: window); the rest goes into memory, window by window.
    overflow: what happens when the local context is full while decoding. "flush" moves all of it into memory at once
    (the released code; right after it, layers without memory see only new tokens). "roll" moves the oldest tokens, one for each new
    one. memory_positions: False for models trained without positions in their memory layers.
    tier, dtype, max_tokens, top_k, lookup, folder: see lcx.memory.Memory.

    Inside the context, `model(input_ids)`, `model(…, labels=…)` and `model.generate` take inputs of any length and
    batches with padding on either side. Training by crossbatch: `model(input_ids, labels=…, contexts=…)`, where each row is one
    chunk and contexts [B, C] comes from crossbatch_contexts. Everything is undone at the end.

    Raises LcxError for settings that do not fit the model, UnsupportedModelError for another family.
    """

    memory_layers: tuple[int, ...]
    window: int | None = None
    last_context: int | None = None
    overflow: str = "flush"
    memory_positions: bool = True
    tier: str = "device"
    dtype: torch.dtype | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    lookup: str = "exact"
    folder: str | Path | None = None

    @classmethod
    def of(cls, model, **changes) -> FocusedAttention:
        """The settings a LongLLaMA checkpoint was released with, from its config, with changes if any are given."""
        from .longllama import focused_settings

        return cls(**{**focused_settings(causal_lm(model).config), **changes})

    @contextmanager
    def __call__(self, model) -> Iterator[Focused]:
        check_free(inner := causal_lm(model))
        focused = Focused(self._checked(inner.config), inner)
        with ExitStack() as stack:
            stack.enter_context(attach(inner, dict.fromkeys(focused.settings.memory_layers, focused.attend)))
            stack.enter_context(replaced(inner, focused.as_forward()))
            yield focused

    def _checked(self, config) -> FocusedAttention:
        layers, longest = tuple(self.memory_layers), config.max_position_embeddings
        window = longest if self.window is None else self.window
        last = window if self.last_context is None else self.last_context
        if len(set(layers)) < len(layers) or any(not 0 <= i < config.num_hidden_layers for i in layers):
            raise LcxError(
                f"memory_layers {layers} must be different numbers from 0 to {config.num_hidden_layers - 1}: "
                f"the model has {config.num_hidden_layers} layers"
            )
        if not 1 <= window <= longest:
            raise LcxError(
                f"window {window} is outside 1 … {longest}, the window of the model: make it smaller"
            )
        if not 1 <= last <= window:
            raise LcxError(f"last_context {last} is outside 1 … {window}, the window: make it smaller")
        if self.overflow not in OVERFLOW:
            raise LcxError(f"unknown overflow rule {self.overflow!r}: use {' or '.join(OVERFLOW)}")
        sliding = getattr(config, "sliding_window", None)
        if sliding is not None and sliding < 2 * window:
            raise LcxError(
                f"the model's own sliding window of {sliding} cuts into a window of {window}: use at most {sliding // 2}"
            )
        return replace(self, memory_layers=layers, window=window, last_context=last)


class _Enough(Exception):
    """Raised in the last memory layer of a window of which only keys and values are wanted."""


@dataclass
class _Crossbatch:
    contexts: torch.Tensor  # [B, C]
    mask: torch.Tensor | None  # [B, S]


@dataclass
class _Window:
    memory: Memory
    mask: torch.Tensor  # bool [B, L + T]: which local keys exist
    cos: torch.Tensor  # [B, L + T, D]: of the local keys, counted from the row's first local token
    sin: torch.Tensor
    pending: dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values of this window
    stop_at: int | None  # leave the model in this layer


class Focused(LongModel):
    """A model with a memory attached. Made by FocusedAttention; `settings` holds them, with defaults filled in."""

    def __init__(self, settings: FocusedAttention, model):
        super().__init__(settings, model)
        self._new_memory()  # says now what is wrong with the settings
        self._masses: dict[int, torch.Tensor] | None = None

    def new_cache(self) -> FocusedCache:
        """An empty cache with an empty memory. Pass it as past_key_values."""
        return FocusedCache.upgrade(FocusedCache(), self._new_memory())

    def _new_memory(self) -> Memory | None:
        s = self.settings
        if not s.memory_layers:
            return None
        options = dict(tier=s.tier, dtype=s.dtype, max_tokens=s.max_tokens, top_k=s.top_k, lookup=s.lookup)
        return Memory(s.memory_layers, **options, folder=s.folder)

    @torch.no_grad()
    def remember(self, input_ids, attention_mask=None, state: FocusedCache | None = None) -> FocusedCache:
        """Put all of input_ids [B, N] into a memory, window by window, and return it as a cache without local tokens.

        state: add to this memory instead of a new one. Use the result for many questions through `.fork()`:
        `model.generate(question, past_key_values=state.fork())`.
        """
        self.need_layers()
        state = self.new_cache() if state is None else state  # a cache without local tokens is falsy
        state.make_room(self, None)
        real = real_tokens(input_ids, attention_mask)
        pieces, _ = split(real, self.settings.window, 0)
        for piece in pieces:
            self._to_memory(input_ids, piece, state, wanted=False)
        return state

    def save(self, state: FocusedCache, path: str | Path) -> Path:
        """Write the memory of `state` to a file that only this model can load."""
        return state.memory.save(path, fingerprint(self.model, self.settings.memory_layers))

    def load(self, path: str | Path) -> FocusedCache:
        """A cache with a memory written by `save`. Raises LcxError if another model made it."""
        made_by = fingerprint(self.model, self.settings.memory_layers)
        memory = Memory.load(path, made_by, device=self.model.device)
        return FocusedCache.upgrade(FocusedCache(), memory)

    @contextmanager
    def recording(self) -> Iterator[dict[int, torch.Tensor]]:
        """Inside, calls with `contexts` leave the attention mass of each memory layer [B, H, S, 1 + C] in the dict."""
        self._masses = {}
        try:
            yield self._masses
        finally:
            self._masses = None

    # The model's forward -------------------------------------------------------------------------------------------

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, contexts=None, **kwargs):
        """As of any LongModel, and with `contexts` one step of crossbatch."""
        call = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        if contexts is None:
            return super().forward(**call, **kwargs)
        for name in ("position_ids", "past_key_values", "use_cache"):
            kwargs.pop(name, None)
        job = _Crossbatch(contexts, attention_mask)
        return self._forward(**call, use_cache=False, focused=job, **kwargs)

    def hidden(self, inputs, real, columns, cache, training):
        if training:
            return self._all_windows_at_once(inputs, real, columns), None
        return self._one_by_one(inputs, real, columns, cache)

    def _all_windows_at_once(self, inputs, real, columns):
        """Training: the windows of every row as one crossbatch in which each sees all windows before it.

        Crossbatch over the chunks of a document is windowed inference; here it keeps the gradients through the memory.
        """
        pieces, last = split(real, self.settings.window, self.settings.last_context)
        pieces = [*pieces, last]
        if len(pieces) > 1:
            self.need_layers()
        width = max(p.columns.shape[1] for p in pieces)
        joined = Piece.stack([p.widen(width) for p in pieces])  # entry w * B + b is window w of row b
        B, count = len(inputs), len(pieces)
        window, row = torch.arange(B * count) // B, torch.arange(B * count) % B
        before = (window[:, None] - 1 - torch.arange(count - 1)) * B + row[:, None]
        job = _Crossbatch(before.clamp(min=-1), joined.real)
        rows = inputs.repeat(count, *[1] * (inputs.ndim - 1))
        hidden = self._decoder(rows, joined, job, attention_mask=joined.real, positions=joined.positions)
        parts = zip(pieces, hidden.split(B), strict=True)
        return collect([(p.widen(width), h) for p, h in parts], columns)

    @torch.no_grad()
    def _one_by_one(self, inputs, real, columns, cache):
        cache = FocusedCache.upgrade(FocusedCache() if cache is None else cache, self._new_memory)
        s = self.settings
        pieces, last = split(real, s.window, s.last_context)
        if pieces:
            self.need_layers()
        too_long = real.sum(1) > s.last_context
        cache.make_room(self, torch.where(too_long, s.window + 1, real.sum(1)))
        parts = []
        for piece in pieces:
            wanted = bool((columns[piece.columns.clamp(min=0)] >= 0)[piece.real].any())
            hidden = self._to_memory(inputs, piece, cache, wanted)
            if wanted:
                parts.append((piece, hidden))
        positions = cache.extend(last.real)
        cache.seen += inputs.shape[1]
        cos, sin = self._rotation(cache.local_positions(), inputs)
        job = _Window(cache.memory, cache.mask, cos, sin, {}, None)
        with cache.local():
            hidden = self._decoder(inputs, last, job, cache.mask, positions, cache)
        return collect([*parts, (last, hidden)], columns), cache

    def _to_memory(self, inputs, piece: Piece, cache: FocusedCache, wanted: bool):
        """Run one window and append its keys and values. Returns hidden states, if they are wanted, else None.

        A window that is not wanted leaves the model in the last memory layer, once its keys and values are known:
        neither its attention nor any later layer can change what is remembered.
        """
        s, hidden = self.settings, None
        cos, sin = self._rotation(piece.positions, inputs)
        job = _Window(cache.memory, piece.real, cos, sin, {}, None if wanted else max(s.memory_layers))
        try:
            hidden = self._decoder(inputs, piece, job, piece.real, piece.positions)
        except _Enough:
            pass
        cache.memory.append(job.pending, piece.real)
        return hidden

    def _decoder(self, inputs, piece: Piece, job, attention_mask, positions, cache=None):
        name = "input_ids" if inputs.ndim == 2 else "inputs_embeds"
        return self.model.model(
            **{name: piece.take(inputs)},
            attention_mask=attention_mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            focused=job,
        ).last_hidden_state

    def _rotation(self, positions, inputs):
        like = torch.empty(0, dtype=self.model.dtype, device=inputs.device)
        return self.model.model.rotary_emb(like, positions)

    def need_layers(self) -> None:
        """Raise LcxError if there is no memory layer: what leaves the window would be forgotten without a word."""
        if not self.settings.memory_layers:
            raise LcxError(
                "without memory_layers everything before the last window would be forgotten: "
                "name the layers that read the memory, or shorten the input"
            )

    # The attention of the memory layers ----------------------------------------------------------------------------

    def attend(self, h: Heads) -> torch.Tensor:
        """The attention of one memory layer: local window and memory under one softmax (paper, section 3.1)."""
        job = h.extra.get("focused")
        turned = rotate if self.settings.memory_positions else lambda x, *_: x
        if job is None:
            raise LcxError("inside FocusedAttention call the model itself, not its decoder: model(input_ids)")
        # Position 0 turns nothing; scaled RoPE (YaRN) still multiplies.
        raw = h.k * self._factor() if self.settings.memory_positions else h.k
        if isinstance(job, _Crossbatch):
            q, k = turned(h.q, h.cos, h.sin), turned(h.k, h.cos, h.sin)
            attention = partial(crossbatch_attention, q, k, h.v, job.contexts, k_memory=raw, mask=job.mask)
            if self._masses is None:
                return attention(scale=h.scale)
            out, self._masses[h.layer] = attention(scale=h.scale, return_mass=True)
            return out
        job.pending[h.layer] = raw, h.v
        if h.layer == job.stop_at:
            raise _Enough
        k, v = h.k, h.v
        if h.cache is not None:
            k, v = h.cache.update(k, v, h.layer)
        T, K = h.q.shape[2], k.shape[2]
        q, k = turned(h.q, job.cos[:, K - T :], job.sin[:, K - T :]), turned(k, job.cos, job.sin)
        if T == K and job.mask.all():
            parts = [attend(q, k, v, h.scale, causal=True)]
        else:
            causal = torch.ones(T, K, dtype=torch.bool, device=k.device).tril(K - T)
            parts = [attend(q, k, v, h.scale, causal & job.mask[:, None, None, :])]
        if len(job.memory):
            parts.append(job.memory.attend(h.layer, q, h.scale))
        return merge(parts)[0]

    def _factor(self) -> float:
        return getattr(self.model.model.rotary_emb, "attention_scaling", 1.0)
