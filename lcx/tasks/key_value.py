"""Key-value recall: one value out of a JSON object of random keys (Liu et al. 2023, Lost in the Middle, section 3).

The published files hold 75, 140 or 300 pairs of UUIDs and count a substring match. Ours draws keys of eight
hexadecimal digits and values of five decimal digits, so that a small model has a chance and the match is exact.
"""

from __future__ import annotations

import random

from .sample import Sample, assemble_records


def sample(
    tokenizer,
    *,
    length: int | None = None,
    pairs: int | None = None,
    depth: float = 0.5,
    seed: int = 0,
    ablate: bool = False,
) -> Sample:
    """One prompt: exactly `length` tokens with as many pairs as fit, or exactly `pairs` pairs.

    depth: which pair is asked for, 0 (first) to 1 (last). ablate: that pair is replaced by another.

    Raises LcxError unless exactly one of length and pairs is given, or when not even one pair fits.
    """
    rng = random.Random(f"key-value/{seed}")
    seen: set[str] = set()

    def fresh(make) -> str:
        while (text := make()) in seen:
            pass
        seen.add(text)
        return text

    def draw() -> tuple[str, str]:
        return fresh(lambda: f"{rng.getrandbits(32):08x}"), fresh(lambda: str(rng.randrange(10_000, 100_000)))

    return assemble_records(
        tokenizer,
        task="key-value",
        length=length,
        count=pairs,
        depth=depth,
        seed=seed,
        head="\nThis JSON object maps keys to values. You will be asked for the value of one key.\n{",
        record=lambda key, value, last: f'\n "{key}": "{value}"' + ("" if last else ","),
        tail="\n}\n",
        question=lambda key: f'\nThe value of the key "{key}" is "',
        draw=draw,
        ablate=ablate,
    )
