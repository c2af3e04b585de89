"""Checks of chapter 3, A test bench for context."""

import random

from ..evaluate import wilson_interval
from ..tasks import Sample
from . import exercise


def _pair(value, what: str):
    assert isinstance(value, tuple | list) and len(value) == 2, f"return a pair {what}"
    return value


@exercise("03-wilson")
def _(wilson):
    for hits, n in [(5, 5), (0, 5), (3, 7), (18, 20), (500, 1000), (1, 1)]:
        low, high = _pair(wilson(hits, n), "(low, high)")
        expected = wilson_interval(hits, n)
        assert low <= high, f"low comes first: wilson({hits}, {n}) gave {low} and {high}"
        for name, got, want in (("low", low, expected[0]), ("high", high, expected[1])):
            assert abs(got - want) < 1e-3, f"{hits} of {n}: {name} should be {want:.3f}, not {got:.3f}"


@exercise("03-place-needle")
def _(place):
    rng = random.Random(3)
    hay = [rng.randrange(100, 1000) for _ in range(500)]
    head, needle, tail = [1, 2, 3], [7, 8], [4, 5, 6, 9]
    for length, depth in [(40, 0), (41, 1), (100, 0.5), (333, 0.1), (9, 0.5)]:
        ids, start = _pair(
            place(list(head), list(hay), list(needle), list(tail), length, depth), "(ids, start)"
        )
        used = length - 9
        assert len(ids) == length, f"length={length}, depth={depth}: the prompt has {len(ids)} tokens"
        assert list(ids[:3]) == head and list(ids[-4:]) == tail, (
            "the prompt starts with head and ends with tail"
        )
        assert list(ids[start : start + 2]) == needle, "`start` must be the index of the needle's first token"
        assert start == 3 + round(depth * used), (
            f"length={length}, depth={depth}: {round(depth * used)} hay tokens come before the needle, not {start - 3}"
        )
        rest = list(ids[3:start]) + list(ids[start + 2 : -4])
        assert rest == hay[:used], "without the needle, the hay must be hay[:used], in its order"
    try:
        place(head, hay, needle, tail, 8, 0.5)
    except ValueError:
        pass
    else:
        raise AssertionError("with length=8 there is no room (9 tokens are fixed): raise ValueError")


def _sample(before: tuple, after: tuple, answer: tuple) -> Sample:
    needle = (50, *answer, 51)
    ids = (*before, *needle, *after, *answer)
    return Sample(ids, len(answer), "", 0.5, (len(before), len(before) + len(needle)), 0, "exercise")


@exercise("03-leak")
def _(leaks):
    answer = (1, 2, 3)
    clean = _sample((9, 1, 2, 9), (3, 2, 1, 9), answer)
    early = _sample((9, 1, 2, 3, 9), (9, 9), answer)
    late = _sample((9, 9), (9, 1, 2, 3), answer)
    edge = _sample((1, 2, 3), (), answer)
    bridge = _sample((9, 1, 2), (3, 9), answer)
    assert leaks([clean]) == 0, (
        "the answer inside the needle, or its tokens apart from each other, is no leak"
    )
    assert leaks([early]) == 1, "an answer that stands before the needle is a leak"
    assert leaks([late]) == 1, (
        "an answer that stands after the needle, up to the end of the prompt, is a leak"
    )
    assert leaks([edge]) == 1, "an answer at the very start of the prompt is a leak"
    assert leaks([bridge]) == 0, (
        "do not join the parts before and after the needle: that makes an answer that is not there"
    )
    got = leaks([clean, early, late, bridge])
    assert abs(got - 0.5) < 1e-9, f"two of four samples leak: the share is 0.5, not {got}"


@exercise("03-sample-size")
def _(samples_needed):
    def overlap(a: float, b: float, n: int) -> bool:
        return wilson_interval(round(a * n), n)[0] <= wilson_interval(round(b * n), n)[1]

    for a, b in [(0.9, 0.5), (1.0, 0.5), (0.9, 0.8), (0.6, 0.5)]:
        n = samples_needed(a, b)
        assert isinstance(n, int) and n >= 10 and n % 10 == 0, (
            f"samples_needed({a}, {b}) should be 10, 20, 30, …, not {n}"
        )
        assert not overlap(a, b, n), f"{a:.0%} against {b:.0%}: with {n} samples the intervals still overlap"
        first = next(k for k in range(10, n + 1, 10) if not overlap(a, b, k))
        assert first == n, f"{a:.0%} against {b:.0%}: already {first} samples are enough, you said {n}"
