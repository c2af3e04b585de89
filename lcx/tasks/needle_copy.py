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
    needles: int = 1,
    cue: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make `batch` sequences. Returns (input_ids, labels), both int64 [batch, length].

    Layout: BOS, then `length - 1 - needle` tokens of filler that hold the needles, then the repeat of the first of them.
    depth: where that needle stands, from 0 (right after BOS) to 1 (right before the repeat); None draws it
    uniformly for every sequence. needles: how many there are; the others stand anywhere and are never asked for. labels
    equal input_ids on the repeat from its token `cue` on and are -100 elsewhere; they are not shifted (transformers
    shifts them itself). With several needles two tokens are needed to tell them apart: cue=2.
    generator: a torch.Generator on the CPU; None takes a new one with seed 0. No global state is read or changed.

    Raises LcxError if the sequence is too short for BOS, the needles and the repeat, if a needle has fewer than 2 or more
    than 64 tokens, if cue leaves nothing to score, or if depth is outside 0 to 1.
    """
    if not 2 <= needle <= len(NEEDLE):
        raise LcxError(f"a needle of {needle} tokens is not possible: use 2 to {len(NEEDLE)}")
    if not 1 <= cue < needle or needles < 1:
        raise LcxError(
            f"needles={needles}, cue={cue}: use at least one needle, and a cue of 1 to {needle - 1}"
        )
    spare = length - 1 - needle * (needles + 1)  # tokens of filler
    if spare < 0:
        one = "a needle" if needles == 1 else f"{needles} needles"
        raise LcxError(
            f"length {length} is too short for {one} of {needle} tokens: use at least {length - spare}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise LcxError(f"depth {depth} is outside 0 to 1")
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    input_ids = torch.randint(FILLER.start, FILLER.stop, (batch, length), generator=generator)
    input_ids[:, 0] = BOS
    # The first `needle` places of a random permutation: a draw without repetition for every needle.
    draws = torch.rand(batch, needles, len(NEEDLE), generator=generator).argsort(dim=-1)[..., :needle]
    tokens = NEEDLE.start + draws
    # How much filler stands before each needle. Those with less of it come first and push the others to the right.
    before = torch.randint(spare + 1, (batch, needles), generator=generator)
    if depth is not None:
        before[:, 0] = round(depth * spare)
    start = 1 + before + needle * before.argsort(dim=1, stable=True).argsort(dim=1)
    places = start[..., None] + torch.arange(needle)
    input_ids.scatter_(1, places.flatten(1), tokens.flatten(1))
    input_ids[:, -needle:] = tokens[:, 0]

    labels = torch.full_like(input_ids, -100)
    labels[:, cue - needle :] = input_ids[:, cue - needle :]
    return input_ids, labels


def needle_chunks(
    documents: int,
    chunk: int = 64,
    needles: int = 3,
    needle: int = 16,
    types: int = 64,
    cue: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Needle-copy across chunks: input_ids and labels, both int64 [documents, 2, chunk].

    The first chunk of a document holds `needles` needles in filler, the second repeats all of them in another order, again in
    filler. All documents of one call use the same `types` needle tokens (drawn anew in every call), so the fewer
    types, the more alike the documents. labels are the repeats from their token `cue` on, -100 elsewhere: `cue` tokens
    must be enough to tell the needles apart. Four of 64 types make 15 million cues, enough for a memory of 262,144 tokens.
    generator: as in needle_copy.

    Raises LcxError if the needles do not fit into a chunk, or for impossible sizes.
    """
    if not 2 <= needle <= types <= len(NEEDLE) or not 1 <= cue < needle:
        raise LcxError(
            f"needles of {needle} tokens of {types} types after a cue of {cue} are not possible: "
            f"use 1 <= cue < needle <= types <= {len(NEEDLE)}"
        )
    spare = chunk - 1 - needles * needle
    if spare < 0 or needles < 1 or documents < 1:
        raise LcxError(
            f"{needles} needles of {needle} tokens and BOS do not fit into a chunk of {chunk}: make it longer"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    alphabet = NEEDLE.start + torch.rand(len(NEEDLE), generator=generator).argsort()[:types]
    draws = torch.rand(documents, needles, types, generator=generator).argsort(-1)[..., :needle]
    tokens = alphabet[draws]
    order = torch.rand(documents, needles, generator=generator).argsort(1)[..., None].expand_as(tokens)

    input_ids = torch.randint(FILLER.start, FILLER.stop, (documents, 2, chunk), generator=generator)
    input_ids[..., 0] = BOS
    labels = torch.full_like(input_ids, -100)
    for half, these in enumerate((tokens, tokens.gather(1, order))):
        # Filler goes before each needle: `spare` tokens are split at random points.
        gaps = torch.randint(spare + 1, (documents, needles), generator=generator).sort(1).values
        starts = 1 + gaps + needle * torch.arange(needles)
        places = (starts[..., None] + torch.arange(needle)).flatten(1)
        input_ids[:, half].scatter_(1, places, these.flatten(1))
        if half:
            scored = (torch.arange(needle) >= cue).expand_as(these)
            labels[:, 1].scatter_(1, places, these.masked_fill(~scored, -100).flatten(1))
    return input_ids, labels
