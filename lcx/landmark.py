"""LandmarkAttention: an unmodified model that opens only the blocks of its past it picks through landmarks (paper, section 3).

In training, a row with a landmark after every block_size - 1 tokens goes through the model at once, with the grouped softmax in
every layer. At inference it goes chunk by chunk: finished blocks are put away, and every query of every head and layer
fetches the top_k whose landmarks it scores highest, placed so that no distance exceeds the trained length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .attention import attach, causal_lm, check_free, replaced
from .errors import LcxError
from .landmark_model import Landmark
from .methods.retrieval import GRANULARITIES


@dataclass(frozen=True)
class LandmarkAttention:
    """`with LandmarkAttention(block_size=64, top_k=4)(model) as landmark:` lets the model reach back any distance.

    block_size: tokens of a block, its landmark included. top_k: how many blocks a query opens; None: all of them, at their true
    positions, as in training. window: tokens of a chunk with their landmarks, a multiple of block_size (default: as many as fit beside
    top_k + 1 blocks into train_length). train_length: tokens, landmarks included, of a training row (default: train_context_length
    of the config, else the model's window). granularity: who shares a choice, see lcx.methods.retrieval; with grouped-query attention every
    query head chooses its own blocks, "head" fetches least. tier, dtype, folder: where blocks live, see lcx.memory.Memory; landmark keys
    stay on the device. max_blocks: keep only the newest. landmark_id: default mem_id of the config. loss_at_landmarks: the model
    was trained to predict landmarks and to predict from them, as the released LLaMA-7B.

    Inside the context, `model(input_ids)`, `model(…, labels=…)` and `model.generate` take inputs of any length WITHOUT landmarks, in
    batches with padding on either side. Landmarks are inserted, logits come back for the given tokens alone, and no
    landmark is ever predicted. A call with gradients is one training step over whole rows. Everything is undone at the end.

    Raises LcxError for settings that do not fit the model, UnsupportedModelError for another family.
    """

    block_size: int = 64
    top_k: int | None = 4
    window: int | None = None
    train_length: int | None = None
    granularity: str = GRANULARITIES[0]
    tier: str = "device"
    dtype: torch.dtype | None = None
    folder: str | Path | None = None
    max_blocks: int | None = None
    landmark_id: int | None = None
    loss_at_landmarks: bool = False

    @classmethod
    def of(cls, model, **changes) -> LandmarkAttention:
        """The settings a checkpoint was trained with, from its config (mem_freq and its kin), with changes if any are given.

        Raises LcxError if the config says nothing of landmarks.
        """
        config = causal_lm(model).config
        if getattr(config, "mem_freq", None) is None:
            raise LcxError(
                "this config has no mem_freq: train with landmarks, or pass block_size and landmark_id"
            )
        found = {
            "block_size": config.mem_freq + 1,
            "loss_at_landmarks": bool(getattr(config, "include_landmark_in_loss", False)),
        }
        return cls(**{**found, **changes})

    @contextmanager
    def __call__(self, model) -> Iterator[Landmark]:
        check_free(inner := causal_lm(model))
        landmark = Landmark(self._checked(inner), inner)
        with ExitStack() as stack:
            everywhere = range(inner.config.num_hidden_layers)
            stack.enter_context(attach(inner, dict.fromkeys(everywhere, landmark.attend)))
            stack.enter_context(replaced(inner, landmark.as_forward()))
            yield landmark

    def _checked(self, model) -> LandmarkAttention:
        config, size, k = model.config, self.block_size, self.top_k
        longest = config.max_position_embeddings
        length = self.train_length or getattr(config, "train_context_length", None) or longest
        if not 2 <= size <= length <= longest:
            raise LcxError(
                f"block_size {size} and train_length {length} do not fit: 2 <= block_size <= train_length <= {longest}, "
                "the window of the model"
            )
        if k is not None and k < 1:
            raise LcxError(
                f"top_k={k} opens no block, so the past would be lost: give at least 1, or None for all"
            )
        if self.granularity not in GRANULARITIES:
            raise LcxError(f"unknown granularity {self.granularity!r}: use {', '.join(GRANULARITIES)}")
        if self.max_blocks is not None and self.max_blocks < 1:
            raise LcxError(f"max_blocks={self.max_blocks}: keep at least 1")
        room = length // size * size - (0 if k is None else (k + 1) * size)
        window = room if self.window is None else self.window
        if window < size or window % size:
            raise LcxError(
                f"a window of {window} tokens is not possible: it must be a multiple of block_size {size}, at least one block "
                f"beside top_k + 1 blocks in a train_length of {length}; make top_k or block_size smaller"
            )
        if k is not None and window > room:
            raise LcxError(
                f"window {window} and {k} + 1 blocks of {size} exceed the train_length of {length}: use at most {room}"
            )
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            raise LcxError(
                f"{rope} RoPE changes with the length, blocks are rotated once: use linear, yarn or llama3"
            )
        if getattr(config, "sliding_window", None) is not None and config.sliding_window < length:
            raise LcxError(
                f"the model's own sliding window of {config.sliding_window} cuts into train_length {length}: use a smaller one"
            )
        token = self.landmark_id if self.landmark_id is not None else getattr(config, "mem_id", None)
        if token is None or not 0 <= token < config.vocab_size:
            raise LcxError(
                f"landmark_id {token} is no token of this model ({config.vocab_size} tokens): add one with "
                "lcx.add_landmark(model, tokenizer), or pass landmark_id"
            )
        return replace(self, window=window, train_length=length, landmark_id=int(token))
