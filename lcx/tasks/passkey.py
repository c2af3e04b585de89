"""Passkey retrieval: one random number hidden in text that does not matter (Mohtashami and Jaggi 2023, section 4.2).

The five filler sentences and the sentence that holds the number are the published ones; instruction and question are
worded by us. The published scripts count the filler in characters, draw the number from 1 to 50,000 and look for the
first integer in what the model generates; here lengths are exact in tokens, the number has five digits always, and the
question ends where the first digit must come.
"""

from __future__ import annotations

import random

from .sample import Sample, assemble

INSTRUCTION = "Somewhere in the text below a pass key is hidden. Find it and remember it: you will be asked for it at the end.\n"
# The same, without a word about what to look for. The published instruction is of this kind ("important info").
VAGUE = "Something important is hidden in the text below. Find it and remember it: you will be asked about it at the end.\n"
QUESTION = "\nWhat is the pass key? The pass key is "


def draw_key(seed: int) -> str:
    """The five digits that `sample` hides for this seed."""
    return str(random.Random(f"passkey/key/{seed}").randrange(10_000, 100_000))


def sample(
    tokenizer,
    *,
    length: int,
    depth: float = 0.5,
    seed: int = 0,
    haystack: str = "filler",
    ablate: bool = False,
    instruction: str = INSTRUCTION,
) -> Sample:
    """One passkey prompt of exactly `length` tokens, answer included.

    depth: 0 to 1, moved to the nearest end of a sentence. seed: draws the number, and the place in the prose.
    haystack: "filler" (the published repeated sentences), "prose" (addresses of US presidents) or your own text.
    ablate: leave the sentence with the number out, the control under which accuracy must fall to chance.

    Raises LcxError when `length` is too short or `depth` is outside 0 to 1.
    """
    key = draw_key(seed)
    return assemble(
        tokenizer,
        task=f"passkey in {haystack}" if haystack in ("filler", "prose") else "passkey",
        length=length,
        seed=seed,
        head=instruction,
        needles=[(depth, f" The pass key is {key}. Remember it. {key} is the pass key.")],
        question=QUESTION,
        answer=key,
        kind=haystack,
        rng=random.Random(f"passkey/haystack/{seed}"),
        ablate=ablate,
    )
