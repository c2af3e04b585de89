"""Needle-copy: the task that all three methods of the book can learn in minutes, so that they can be compared.

A sequence is random filler with one needle, 16 distinct needle tokens in a row, somewhere in it. Its last 16 tokens
repeat the needle. A model scores on the repeat from its second token on: it must find the one earlier place where
the token it just saw stands, and copy what follows. That is induction across any distance, and 15 targets in each
sequence let it form quickly. Only the needle holds needle tokens, and they are distinct, so each answer is unique.
"""

from __future__ import annotations

import torch

from ..errors import LcxError

BOS = 0
FILLER = range(1, 17)  # 16 types, drawn with repetition
NEEDLE = range(17, 81)  # 64 types, drawn without
VOCAB_SIZE = 81


def needle_copy(
    batch: int,
    length: int,
    needle: int = 16,
    depth: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make `batch` sequences. Returns (input_ids, labels), both int64 [batch, length].

    Layout: BOS, then `length - 1 - needle` tokens of filler that hold the needle, then the repeat of `needle` tokens.
    depth: where the needle stands, from 0 (right after BOS) to 1 (right before the repeat); None draws it
    uniformly for every sequence. labels equal input_ids on the tokens 2 to `needle` of the repeat and are -100
    elsewhere; they are not shifted (transformers shifts them itself).
    generator: a torch.Generator on the CPU; None takes a new one with seed 0. No global state is read or changed.

    Raises LcxError if the sequence is too short for BOS and two needles, if the needle has fewer than 2 or more
    than 64 tokens, or if depth is outside 0 to 1.
    """
    if not 2 <= needle <= len(NEEDLE):
        raise LcxError(f"a needle of {needle} tokens is not possible: use 2 to {len(NEEDLE)}")
    last_start = length - 2 * needle  # the needle then ends where the repeat starts
    if last_start < 1:
        raise LcxError(
            f"length {length} is too short for a needle of {needle} tokens: use at least {2 * needle + 1}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise LcxError(f"depth {depth} is outside 0 to 1")
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    input_ids = torch.randint(FILLER.start, FILLER.stop, (batch, length), generator=generator)
    input_ids[:, 0] = BOS
    # The first `needle` places of a random permutation: a draw without repetition for every row.
    tokens = NEEDLE.start + torch.rand(batch, len(NEEDLE), generator=generator).argsort(dim=1)[:, :needle]
    if depth is None:
        start = torch.randint(1, last_start + 1, (batch, 1), generator=generator)
    else:
        start = torch.full((batch, 1), 1 + round(depth * (last_start - 1)))
    input_ids.scatter_(1, start + torch.arange(needle), tokens)
    input_ids[:, -needle:] = tokens

    labels = torch.full_like(input_ids, -100)
    labels[:, 1 - needle :] = input_ids[:, 1 - needle :]
    return input_ids, labels
