"""landmark-text: the needles of landmark-256, hidden in State of the Union addresses instead of random filler."""

from __future__ import annotations

import torch

from ...tasks.needle_copy import NEEDLE, needle_copy
from . import landmark_256, lm_256

FIRST_NEEDLE = lm_256.VOCAB_SIZE
LANDMARK = FIRST_NEEDLE + len(NEEDLE)


def tokenizer():
    """The byte-pair encoding of lm-256, 64 needle tokens n0 … n63, <landmark>."""
    made = lm_256.tokenizer()
    made.add_tokens([f"n{i}" for i in range(len(NEEDLE))])
    made.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    return made


def maker(tok, split: str):
    """A function like needle_copy whose filler is running text of the split, from a random place for every row."""
    stream = lm_256.stream(tok, split)

    def make(batch: int, length: int, needle: int = 16, *, generator: torch.Generator, **options):
        ids, labels = needle_copy(batch, length, needle, generator=generator, **options)
        starts = torch.randint(len(stream) - length + 1, (batch, 1), generator=generator)
        words = stream[starts + torch.arange(length)]
        shift = FIRST_NEEDLE - NEEDLE.start
        ids = torch.where(ids >= NEEDLE.start, ids + shift, words)
        ids[:, 0] = tok.bos_token_id
        return ids, torch.where(labels >= 0, labels + shift, labels)

    return make


def data(tok, seed: int, examples: int):
    return landmark_256.Batches(examples, seed, maker(tok, "train")), None


def score(model, tok) -> dict[str, float]:
    """As of landmark-256, in text of the held-out split."""
    return landmark_256.score(model, tok, maker(tok, "heldout"))


RECIPE = landmark_256.make_recipe(
    "landmark-text",
    "in running text, trained with a landmark in every block of 16",
    True,
    LANDMARK,
    data_about="needle-copy, made by lcx.tasks.needle_copy, in State of the Union addresses (train split): 64 needle types, "
    "1 to 4 needles of 8 tokens, rows of 60 to 240 tokens",
    tokenizer=tokenizer,
    data=data,
    score=score,
)
