"""Needle in a haystack: a fact in real prose that must be told apart from others of its kind.

The idea of Kamradt's test (2023) and of the tasks niah_single and niah_multikey of RULER (Hsieh et al. 2024): a
sentence that has nothing to do with its surroundings, placed at a chosen depth. Ours asks for a number, so that the
answer can be matched exactly, and hides it in addresses of US presidents. With `distractors`, sentences of the same
form about other safes stand around it; then copying any number is no longer enough.
"""

from __future__ import annotations

import random

from .sample import Sample, assemble

COLOURS = (
    "amber",
    "black",
    "blue",
    "brown",
    "copper",
    "green",
    "grey",
    "ivory",
    "red",
    "silver",
    "white",
    "yellow",
)
CITIES = (
    "Athens",
    "Bergen",
    "Cairo",
    "Dakar",
    "Havana",
    "Kyoto",
    "Lima",
    "Lisbon",
    "Oslo",
    "Porto",
    "Quito",
    "Vienna",
)


def sample(
    tokenizer,
    *,
    length: int,
    depth: float = 0.5,
    seed: int = 0,
    distractors: int = 0,
    haystack: str = "prose",
    ablate: bool = False,
) -> Sample:
    """One needle prompt of exactly `length` tokens, answer included; arguments as for `passkey.sample`.

    distractors: how many further safes, each with its own city, colour and number, stand at random depths.

    Raises LcxError when `length` is too short; ValueError for more distractors than there are safes (143).
    """
    rng = random.Random(f"needle/{seed}")
    safes = rng.sample([(colour, city) for colour in COLOURS for city in CITIES], distractors + 1)
    numbers = [str(n) for n in rng.sample(range(10_000, 100_000), distractors + 1)]
    texts = [
        f" The {colour} safe in {city} opens with the number {number}."
        for (colour, city), number in zip(safes, numbers, strict=True)
    ]
    depths = [depth, *(rng.random() for _ in range(distractors))]
    colour, city = safes[0]
    return assemble(
        tokenizer,
        task=f"needle among {distractors + 1}",
        length=length,
        seed=seed,
        head="Read the text below. At the end you will be asked which number opens a safe.\n",
        needles=list(zip(depths, texts, strict=True)),
        question=f"\nWhich number opens the {colour} safe in {city}? The {colour} safe in {city} opens with the number ",
        answer=numbers[0],
        kind=haystack,
        rng=random.Random(f"needle/haystack/{seed}"),
        ablate=ablate,
    )
