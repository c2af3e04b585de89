"""SelfExtend: an unmodified, untrained model reads texts several times as long as its window (Jin et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from .attention import Heads, attach, causal_lm, check_free, in_place_of, replaced, rope_tables
from .errors import LcxError
from .methods.selfextend import check_groups, selfextend_attention


@dataclass(frozen=True)
class SelfExtend:
    """`with SelfExtend(group_size=8, neighbor_window=1024)(model) as extended:` stretches the window without training.

    Keys less than neighbor_window tokens away are seen at their true distance, all others at that of their group of group_size
    tokens. A model with a window of L reaches (L - neighbor_window) * group_size + neighbor_window tokens,
    `extended.longest`; the authors advise to stay below two thirds of L in what the model is shown. group_size 1 changes nothing.

    Inside the context, `model(input_ids)` and `model.generate` work as before, with batches padded on either side and
    labels too. Positions are counted by the method, from the first real token of each row. Caches hold keys before RoPE:
    use them under SelfExtend only. Everything is undone at the end.

    Raises LcxError for settings that do not fit the model, UnsupportedModelError for another family.
    """

    group_size: int
    neighbor_window: int

    @contextmanager
    def __call__(self, model) -> Iterator[SelfExtended]:
        check_free(inner := causal_lm(model))
        self._check(inner)
        extended = SelfExtended(self, inner)
        with ExitStack() as stack:
            layers = range(inner.config.num_hidden_layers)
            stack.enter_context(attach(inner, dict.fromkeys(layers, extended.attend)))
            stack.enter_context(replaced(inner.model, extended.as_forward()))
            yield extended

    def _check(self, model) -> None:
        check_groups(self.group_size, self.neighbor_window)
        longest = model.config.max_position_embeddings
        if self.neighbor_window > longest:
            raise LcxError(
                f"neighbor_window {self.neighbor_window} is more than the model's window of {longest}: make it smaller"
            )
        if (kind := model.model.rotary_emb.rope_type) in ("dynamic", "longrope"):
            raise LcxError(
                f"{kind} RoPE changes with the length of the text and SelfExtend counts on fixed frequencies: use one of them"
            )
        if (sliding := getattr(model.config, "sliding_window", None)) is not None:
            raise LcxError(
                f"the model's sliding window of {sliding} hides what SelfExtend brings near: load it with sliding_window=None"
            )


class SelfExtendCache(DynamicCache):
    """Keys before RoPE, because every query sees them at two positions."""

    @classmethod
    def of(cls, cache, config) -> SelfExtendCache:
        """`cache` itself, if it is ours, or turned into ours, if it is an empty DynamicCache; a new one for None."""
        if cache is None:
            return cls(config=config)
        if type(cache) is DynamicCache and not cache.get_seq_length():
            cache.__class__ = cls
        if not isinstance(cache, cls):
            raise LcxError(
                f"{type(cache).__name__} does not hold keys as SelfExtend needs them: start with an empty DynamicCache"
            )
        return cache


@dataclass
class _Call:
    positions: Tensor  # int64 [B, S], of all keys
    real: Tensor | None  # bool [B, S]
    cos: Tensor  # [P, D / 2]
    sin: Tensor


class SelfExtended:
    """A model under SelfExtend, made by it. settings: the SelfExtend; longest: tokens it reaches without unseen distances."""

    def __init__(self, settings: SelfExtend, model):
        self.settings, self.model = settings, model
        near = settings.neighbor_window
        self.longest = (model.config.max_position_embeddings - near) * settings.group_size + near
        self._forward, self._table = model.model.forward, None

    def as_forward(self):
        return in_place_of(self._forward, self.forward)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        use_cache = self.model.config.use_cache if use_cache is None else use_cache
        if past_key_values is not None or use_cache:
            past_key_values = SelfExtendCache.of(past_key_values, self.model.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        real = _real(inputs, seen, attention_mask)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        call = _Call(positions, None if real.all() else real, *self._rotation(real.shape[1]))
        return self._forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            # With four dimensions it passes for ready, else a mask of T x S is made, of which we have no use.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device),
            position_ids=positions[:, seen:],
            past_key_values=past_key_values,
            use_cache=use_cache,
            self_extend=call,
            **kwargs,
        )

    def attend(self, h: Heads) -> Tensor:
        """The attention of every layer."""
        call: _Call = h.extra["self_extend"]
        k, v = (h.k, h.v) if h.cache is None else h.cache.update(h.k, h.v, h.layer)
        groups = self.settings.group_size, self.settings.neighbor_window
        at = call.positions[:, -h.q.shape[2] :]
        return selfextend_attention(
            h.q, k, v, at, call.positions, call.cos, call.sin, *groups, h.scale, call.real
        )

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least `length` positions and all distances shown: made ahead, not anew for every token."""
        rotary, near = self.model.model.rotary_emb, self.settings.neighbor_window
        if (
            self._table is None
            or self._table[0] is not rotary.inv_freq
            or len(self._table[1]) < length + near
        ):
            tables = rope_tables(self.model, 2 * (length + near), rotary.inv_freq.device)
            self._table = rotary.inv_freq, *tables
        return self._table[1:]


def _real(inputs: Tensor, seen: int, mask: Tensor | None) -> Tensor:
    """bool [B, seen + N]: which of the tokens in the cache and in the input are none of padding."""
    shape = (len(inputs), seen + inputs.shape[1])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=inputs.device)
    if mask.shape != shape:
        raise LcxError(
            f"attention_mask {tuple(mask.shape)} does not fit {shape}, all tokens seen so far: give one row of 0 and 1 each"
        )
    return mask.bool()
