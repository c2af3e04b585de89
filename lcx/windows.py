"""Cutting a batch of rows of unequal length into windows of real tokens, and putting the results back in place.

Windows are counted in real tokens, row by row, so that padding on either side changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import LcxError


@dataclass(frozen=True)
class Piece:
    """One window of every row. columns: int64 [B, T], which column of the input each token is, -1 for none."""

    columns: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """bool [B, T]."""
        return self.columns >= 0

    @property
    def positions(self) -> torch.Tensor:
        """int64 [B, T], from 0 at the first real token of each row."""
        return (self.real.cumsum(1) - 1).clamp(min=0)

    def take(self, inputs: torch.Tensor) -> torch.Tensor:
        """The tokens [B, T] (or embeddings [B, T, hidden]) of this window; something unseen where there is none."""
        index = self.columns.clamp(min=0)
        if inputs.ndim == 3:
            index = index[..., None].expand(-1, -1, inputs.shape[-1])
        return inputs.gather(1, index)

    def widen(self, width: int) -> Piece:
        """The same window with room for `width` tokens, filled up on the right."""
        return Piece(F.pad(self.columns, (0, width - self.columns.shape[1]), value=-1))

    @staticmethod
    def stack(pieces: list[Piece]) -> Piece:
        """Windows of one width on top of each other."""
        return Piece(torch.cat([p.columns for p in pieces]))


def split(real: torch.Tensor, window: int, last: int) -> tuple[list[Piece], Piece]:
    """Windows of at most `window` tokens over all but the last `last` tokens of each row, and the piece of those.

    real: bool [B, N]. Windows start at the left, the last piece ends at the right of its tensor, so that decoding
    can go on from there.
    """
    counts = real.sum(1, keepdim=True)
    # Real columns first, in their order: a stable sort of "is padding".
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    prefix = (counts - last).clamp(min=0)
    pieces = []
    for start in range(0, int(prefix.max()), window):
        place = start + torch.arange(min(window, int(prefix.max()) - start), device=real.device)
        pieces.append(Piece(torch.where(place < prefix, order[:, place], -1)))
    width = int((counts - prefix).max())
    place = counts - width + torch.arange(width, device=real.device)
    return pieces, Piece(torch.where(place >= prefix, order.gather(1, place.clamp(min=0)), -1))


def kept_columns(length: int, logits_to_keep, device) -> torch.Tensor:
    """int64 [length]: the place of each column among those whose logits are wanted, -1 if they are not.

    logits_to_keep: 0 for all, n for the last n, or a tensor of column indices, as in transformers.
    """
    every = torch.arange(length, device=device)
    wanted = every[-logits_to_keep:] if isinstance(logits_to_keep, int) else every[logits_to_keep]
    return torch.full_like(every, -1).scatter(0, wanted, torch.arange(len(wanted), device=device))


def collect(parts: list[tuple[Piece, torch.Tensor]], columns: torch.Tensor) -> torch.Tensor:
    """Hidden states of the windows [B, T, hidden] put back at the wanted columns: [B, wanted, hidden], 0 on padding."""
    out = None
    for piece, hidden in parts:
        if out is None:
            out = hidden.new_zeros(len(hidden), int(columns.max()) + 1, hidden.shape[-1])
        target = torch.where(piece.real, columns[piece.columns.clamp(min=0)], -1)
        row, t = (target >= 0).nonzero(as_tuple=True)
        out = out.index_put((row, target[row, t]), hidden[row, t])
    return out


def real_tokens(inputs, attention_mask) -> torch.Tensor:
    """bool [B, N] of the new tokens. A mask that also covers earlier tokens, as in generate, is cut to the new ones."""
    B, N = inputs.shape[:2]
    if attention_mask is None:
        return torch.ones(B, N, dtype=torch.bool, device=inputs.device)
    if attention_mask.ndim != 2 or len(attention_mask) != B or attention_mask.shape[1] < N:
        raise LcxError(
            f"attention_mask {tuple(attention_mask.shape)} does not fit inputs {(B, N)}: give one row of 0 and 1 each"
        )
    return attention_mask[:, -N:].bool()
