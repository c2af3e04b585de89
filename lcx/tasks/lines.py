"""LongChat lines: the number that stands on one named line (Li et al. 2023, LongChat, the LongEval lines task).

The form of a line is the published one, `line <adjective-noun>: REGISTER_CONTENT is <number>`; word lists, preamble and
question are ours. LongEval uses 200 to 680 lines of about 24 tokens and asks for a random one; here you choose it.
"""

from __future__ import annotations

import random

from .sample import Sample, assemble_records

ADJECTIVES = (
    "amber bitter brave bright calm clever cold curious deep eager early faint fierce gentle golden grand happy hollow "
    "honest humble idle jolly keen kind late lively lonely loud lucky mellow mild modest narrow noble pale patient plain "
    "proud quick quiet rapid rare rough round rusty shy silent simple slow small smooth soft steady stern still strong "
    "sunny swift tall tame tender thin tidy tiny vast warm weary wide wild wise"
).split()
NOUNS = (
    "anchor apple arrow badge barn basket beacon bell bird boat bridge brook candle canyon castle cloud coin comet corner "
    "crane door dream drum eagle engine falcon feather field flame forest fountain garden gate harbor hill horse island "
    "kettle kite ladder lake lamp lantern leaf maple meadow mirror moon mountain needle oak ocean orchard otter owl "
    "paper pebble pine planet pond quilt rabbit river robin rocket sail shadow shell silver sparrow spoon star stone "
    "storm table thread tiger tower trail tree tulip valley violin wagon whale willow window winter wolf"
).split()


def sample(
    tokenizer,
    *,
    length: int | None = None,
    count: int | None = None,
    depth: float = 0.5,
    seed: int = 0,
    ablate: bool = False,
) -> Sample:
    """One prompt: exactly `length` tokens with as many lines as fit, or exactly `count` lines.

    depth: which line is asked for, 0 (first) to 1 (last). ablate: that line is replaced by another.

    Raises LcxError unless exactly one of length and count is given, or when not even one line fits;
    ValueError for more lines than there are names.
    """
    rng = random.Random(f"lines/{seed}")
    names = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    rng.shuffle(names)
    values = rng.sample(range(10_000, 100_000), len(names))
    source = iter(zip(names, map(str, values), strict=True))

    def draw() -> tuple[str, str]:
        try:
            return next(source)
        except StopIteration:
            raise ValueError(
                f"there are names for {len(names):,} lines only: ask for a shorter prompt"
            ) from None

    return assemble_records(
        tokenizer,
        task="lines",
        length=length,
        count=count,
        depth=depth,
        seed=seed,
        head="\nRemember the lines below. You will be asked for the register content of one of them.\n",
        record=lambda key, value, last: f"\nline {key}: REGISTER_CONTENT is <{value}>",
        tail="\n",
        question=lambda key: (
            f"\nWhat is the REGISTER_CONTENT in line {key}? The REGISTER_CONTENT in line {key} is <"
        ),
        draw=draw,
        ablate=ablate,
    )
