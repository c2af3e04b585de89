"""A model inside LandmarkAttention: whole rows in training, chunks and fetched blocks at inference (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Heads, rope_tables
from .errors import LcxError
from .landmark_cache import LandmarkCache, Layout, chunks
from .long_model import LongModel
from .memory import Memory
from .methods.landmark import landmark_attention
from .methods.retrieval import attend_blocks, choose_blocks, score_blocks
from .methods.rope import rotate
from .softmax import attend, merge
from .windows import Piece, collect, real_tokens

TILE_BYTES = 2**25  # of scores and fetched keys and values at once, unless a single query needs more


class _Enough(Exception):
    """Raised in the last layer of a chunk of which only keys and values are wanted."""


@dataclass
class Dense:
    """Whole rows at once: cos, sin [B, T, D / 2] of the positions and which tokens exist, None for all."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


@dataclass
class Chunk:
    """What the layers need of one chunk, and what they leave in `local`."""

    layout: Layout
    cache: LandmarkCache
    length: Tensor  # int64 [B], of the local context
    recent: Tensor | None  # None while there is no block
    local: dict[int, tuple[Tensor, Tensor]]  # keys and values of the local context, unfinished block first
    stop_at: int | None  # leave the model in this layer


@dataclass(frozen=True)
class Opened:
    """What one layer fetched for one chunk. positions: int64 [B, T], place of each query in the row's text with its landmarks, -1 for none.
    blocks: int64 [B, H, T, k], which blocks of the text it opened, ascending, -1 for none; H or T is 1 where all share a choice."""

    layer: int
    positions: Tensor
    blocks: Tensor


class Landmark(LongModel):
    """A model that retrieves blocks. Made by LandmarkAttention; `settings` holds them, with defaults filled in."""

    def __init__(self, settings, model):
        super().__init__(settings, model)
        self.new_cache()  # says now what is wrong with the settings
        self._table: tuple[Tensor, Tensor] | None = None
        self._trace: list[Opened] | None = None

    def new_cache(self) -> LandmarkCache:
        """An empty cache. Pass it as past_key_values."""
        return self._upgraded(LandmarkCache())

    def _upgraded(self, cache) -> LandmarkCache:
        s = self.settings
        memory = Memory(
            range(self.model.config.num_hidden_layers),
            tier=s.tier,
            dtype=s.dtype,
            folder=s.folder,
            max_tokens=None if s.max_blocks is None else s.max_blocks * s.block_size,
        )
        return LandmarkCache.upgrade(cache, memory, s.block_size)

    @torch.no_grad()
    def remember(self, input_ids, attention_mask=None, state: LandmarkCache | None = None) -> LandmarkCache:
        """Read all of input_ids [B, N], chunk by chunk, and return the cache.

        state: go on from this cache instead of a new one. Use the result for many questions through `.fork()`:
        `model.generate(question, past_key_values=state.fork())`.
        """
        columns = torch.full((input_ids.shape[1],), -1, device=input_ids.device)
        real = real_tokens(input_ids, attention_mask)
        self._refuse_landmarks(input_ids, real)
        state = self.new_cache() if state is None else state  # an empty cache is falsy
        seen = state.seen
        self._by_chunks(input_ids, real, columns, state)
        state.seen = seen  # generate cuts its input by what of it the cache has seen: this is not part of it
        return state

    @contextmanager
    def recording(self) -> Iterator[list[Opened]]:
        """Inside, every layer and chunk that fetches blocks leaves an Opened in the list."""
        self._trace = []
        try:
            yield self._trace
        finally:
            self._trace = None

    # The model's forward -------------------------------------------------------------------------------------------

    def hidden(self, inputs, real, columns, cache, training):
        self._refuse_landmarks(inputs, real)
        if training or (self.settings.top_k is None and cache is None):
            return self._whole(inputs, real, columns), None
        return self._by_chunks(inputs, real, columns, cache)

    def _refuse_landmarks(self, inputs, real):
        if inputs.ndim == 2 and (real & (inputs == self.settings.landmark_id)).any():
            raise LcxError(
                f"the input contains the landmark, token {self.settings.landmark_id}: landmarks are inserted here, remove them"
            )

    def logits(self, hidden):
        logits = self.model.lm_head(hidden)
        token = torch.arange(logits.shape[-1], device=logits.device) == self.settings.landmark_id
        return logits.masked_fill(token, float("-inf"))

    def loss(self, logits, labels, **kwargs):
        parts, self._parts = self._parts, None
        if not self.settings.loss_at_landmarks:
            return super().loss(logits, labels, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise LcxError("with loss_at_landmarks landmarks are targets too: give labels, not shift_labels")
        # The landmark and what follows it are targets like any other.
        columns, landmark = (
            torch.cat([getattr(layout, x) for layout, _ in parts], 1) for x in ("columns", "landmark")
        )
        order = (columns < 0).to(torch.int8).argsort(dim=1, stable=True)  # no gaps between a row's chunks
        columns, landmark = columns.gather(1, order), landmark.gather(1, order)
        hidden = torch.cat([hidden for _, hidden in parts], 1)
        hidden = hidden.gather(1, order[..., None].expand_as(hidden))
        targets = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
        targets = targets.masked_fill(landmark, self.settings.landmark_id)
        return super().loss(self.model.lm_head(hidden), targets, **kwargs)

    _parts = None

    def _whole(self, inputs, real, columns):
        """Training: every row at once, positions and blocks counted from its first token."""
        s = self.settings
        none = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        (layout,) = chunks(real, none, s.block_size, None)
        cos, sin = self._rotation(int(layout.positions.max()) + 1, inputs)
        mask = None if layout.uniform else layout.real
        job = Dense(cos[layout.positions], sin[layout.positions], mask)
        hidden = self._decoder(inputs, layout, job)
        return self._outputs([(layout, hidden)], columns)

    @torch.no_grad()
    def _by_chunks(self, inputs, real, columns, cache):
        s = self.settings
        given = self.new_cache() if cache is None else self._upgraded(cache)
        cache = given.fork()  # what fails or is interrupted half-way leaves the given one as it was
        cache.open(len(inputs), inputs.device)
        parts, last = [], self.model.config.num_hidden_layers - 1
        for layout in chunks(real, cache.tail_length, s.block_size, s.window):
            wanted = bool((columns[layout.columns.clamp(min=0)] >= 0)[layout.real].any())
            length = torch.where(layout.length < 0, cache.tail_length, layout.length)
            k = cache.blocks if s.top_k is None else s.top_k
            recent = cache.recent(k) if cache.blocks else None
            job = Chunk(layout, cache, length, recent, {}, None if wanted else last)
            try:
                hidden = self._decoder(inputs, layout, job)
                parts.append((layout, hidden))
            except _Enough:
                pass
            cache.add(job.local, length)
        cache.seen += inputs.shape[1]
        vars(given).update(vars(cache))
        return (self._outputs(parts, columns) if parts else None), given

    def _outputs(self, parts, columns):
        """Hidden states of the wanted columns. The landmark shares the column of the token before it: one of the two counts."""
        ours = []
        for layout, hidden in parts:
            before = torch.roll(layout.landmark, -1, 1)
            before[:, -1] = False
            hide = before if self.settings.loss_at_landmarks else layout.landmark
            ours.append((Piece(layout.columns.masked_fill(hide, -1)), hidden))
        self._parts = parts if self.settings.loss_at_landmarks else None
        return collect(ours, columns)

    def _decoder(self, inputs, layout: Layout, job):
        taken = Piece(layout.columns).take(inputs)
        token = torch.full_like(layout.columns, self.settings.landmark_id)
        if inputs.ndim == 2:
            call = {"input_ids": torch.where(layout.landmark, token, taken)}
        else:
            embedded = self.model.get_input_embeddings()(token)
            call = {"inputs_embeds": torch.where(layout.landmark[..., None], embedded, taken)}
        return self.model.model(
            **call,
            attention_mask=layout.real.long(),
            position_ids=layout.positions,
            use_cache=False,
            landmark=job,
        ).last_hidden_state

    def _rotation(self, length: int, inputs) -> tuple[Tensor, Tensor]:
        """cos and sin [length or more, D / 2] of the positions from 0 on."""
        if self._table is None or len(self._table[0]) < length or self._table[0].device != inputs.device:
            self._table = rope_tables(self.model, length, inputs.device)
        return self._table

    # The attention of every layer ----------------------------------------------------------------------------------

    def attend(self, h: Heads) -> Tensor:
        """Grouped softmax over the local context and, at inference, the fetched blocks."""
        job = h.extra.get("landmark")
        if isinstance(job, Dense):
            q, k = rotate(h.q, job.cos, job.sin), rotate(h.k, job.cos, job.sin)
            return landmark_attention(q, k, h.v, self.settings.block_size, h.scale, job.mask)
        if not isinstance(job, Chunk):
            raise LcxError(
                "inside LandmarkAttention call the model itself, not its decoder: model(input_ids)"
            )
        parts = [self._local(h, job)]
        if job.recent is not None:
            parts.append(self._fetched(h, job))
        return merge(parts)[0]

    def _local(self, h: Heads, job: Chunk) -> tuple[Tensor, Tensor]:
        """The chunk and the unfinished block before it."""
        size, at = self.settings.block_size, job.layout.positions
        L = int(job.length.max())
        cos, sin = self._rotation(L, h.q)
        tail = job.cache.tail.get(h.layer)
        stored = rotate(h.k, cos[at % size], sin[at % size])
        local = _placed(stored, tail and tail[0], job, L), _placed(h.v, tail and tail[1], job, L)
        job.local[h.layer] = local
        if h.layer == job.stop_at:
            raise _Enough
        q, (k, v) = rotate(h.q, cos[at], sin[at]), local
        job.cache.traffic["local"] += 2 * k.numel() * k.element_size()
        if L <= size:  # one block: plain attention without the landmark
            j = torch.arange(L, device=at.device)
            return attend(q, k, v, h.scale, ((j <= at[..., None]) & (j < size - 1))[:, None])
        k = _placed(rotate(h.k, cos[at], sin[at]), tail and tail[0], job, L)
        if job.layout.uniform:  # the queries are the last positions
            return landmark_attention(q, k, v, size, h.scale, return_lse=True)
        there = torch.arange(L, device=at.device) < job.length[:, None]
        square = _placed(q, q.new_zeros(len(q), q.shape[1], 0, q.shape[3]), job, L)
        out, lse = landmark_attention(square, k, v, size, h.scale, there, return_lse=True)
        return out.gather(2, at[:, None, :, None].expand_as(q)), lse.gather(
            2, at[:, None].expand(q.shape[:3])
        )

    def _fetched(self, h: Heads, job: Chunk) -> tuple[Tensor, Tensor]:
        """Score the landmarks of all blocks, fetch the best, attend to them: tile by tile of queries, if they choose for themselves."""
        s, cache = self.settings, job.cache
        size, at, k = s.block_size, job.layout.positions, job.recent.shape[1]
        self._rotation(s.window + (k + 2) * size, h.q)
        landmarks = cache.landmarks[h.layer]
        cache.traffic["landmarks"] += landmarks.numel() * landmarks.element_size()
        T, each = h.q.shape[2], 2 * h.q[:, :, :1].numel() * h.q.element_size() * k * size
        each += 8 * len(h.q) * h.q.shape[1] * landmarks.shape[2]  # scores, as they are sorted
        tile = T if s.granularity == "head" else max(1, TILE_BYTES // each)
        parts, opened = [], []
        for start in range(0, T, tile):
            rows = slice(start, start + tile)
            turned = _turned(h.q[:, :, rows], at[:, rows], size, k + 1, *self._table)
            scores = score_blocks(turned, landmarks, job.recent, h.scale)
            scores = scores.masked_fill(~job.layout.real[:, None, rows, None], float("-inf"))
            blocks = choose_blocks(scores, cache.valid, k, s.granularity)
            if self._trace is not None:
                opened.append(blocks)
            blocks = blocks.expand(-1, h.q.shape[1], -1, -1)
            parts.append(attend_blocks(turned, *cache.fetch(h.layer, blocks), blocks, job.recent, h.scale))
        if self._trace is not None:
            self._record(h.layer, job, torch.cat(opened, 2))
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, 2), torch.cat(lse, 2)

    def _record(self, layer: int, job: Chunk, blocks: Tensor) -> None:
        cache = job.cache
        ordinals = cache.ordinals()
        row = torch.arange(len(blocks), device=blocks.device).view(-1, 1, 1, 1)
        named = torch.where(blocks < 0, -1, ordinals[row, blocks.clamp(min=0)])
        before = (cache.dropped + cache.valid.sum(1))[:, None] * self.settings.block_size
        positions = torch.where(job.layout.real, job.layout.positions + before, -1)
        self._trace.append(Opened(layer, positions.cpu(), named.cpu()))


def _turned(q: Tensor, at: Tensor, size: int, count: int, cos: Tensor, sin: Tensor) -> Tensor:
    """q [B, H, T, D] as it sees blocks 1 … count blocks back: [B, H, T, count, D]."""
    place = (at[..., None] + size * torch.arange(1, count + 1, device=at.device)).flatten(1)
    return rotate(q.repeat_interleave(count, 2), cos[place], sin[place]).unflatten(2, (-1, count))


def _placed(new: Tensor, tail: Tensor | None, job: Chunk, length: int) -> Tensor:
    """Local tokens in their places [B, heads, length, D]: those of the unfinished block, then those of the chunk."""
    if job.layout.uniform:
        return new if tail is None or not tail.shape[2] else torch.cat([tail, new], 2)
    B, heads, _, D = new.shape
    room = new.new_zeros(B, heads, length + 1, D)  # the last place takes what does not exist
    if tail is not None:
        room[:, :, : tail.shape[2]] = tail
    place = torch.where(job.layout.real, job.layout.positions, length)
    return room.scatter(2, place[:, None, :, None].expand_as(new), new)[:, :, :length]
