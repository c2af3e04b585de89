"""Checks of chapter 10, Far positions in short rows: CREAM."""

import numpy as np

from ..methods.coverage import coverage
from ..methods.cream import cream_positions
from . import exercise


@exercise("10-pose")
def _(pose):
    for n, factor, first, skip in [(8, 4, 3, 10), (8, 4, 3, 0), (8, 4, 1, 24), (8, 4, 4, 99), (64, 8, 20, 448), (5, 1, 2, 3)]:  # fmt: skip
        call, got = f"pose({n}, {factor}, {first}, {skip})", pose(n, factor, first, skip)
        assert len(got) == n, f"{call}: one label for each of the {n} tokens"
        assert max(got) < n * factor, f"{call}: label {max(got)} lies beyond the last one, {n * factor - 1}"
        most = min(skip, n * factor - n)
        want = [*range(first), *range(first + most, n + most)]
        assert list(got) == want, f"{call} should be {want}, not {list(got)}"


@exercise("10-room")
def _(room):
    table = {  # (n, factor, alpha, h): ends of P_e, of the specification
        (4096, 8, 1, 32): (4063, 4063), (4096, 8, 1.5, 32): (6078, 6111), (4096, 8, 2, 32): (8094, 8159),
        (4096, 8, 4.5, 32): (18171, 18399), (4096, 8, 8, 32): (32280, 32735),
        (12, 4, 2.5, 1): (23, 28), (65, 4, 1.5, 3): (90, 93),
        (4096, 8, 1, 1365): (2730, 2730), (4096, 8, 2, 1365): (4095, 6826), (4096, 8, 8, 1365): (12285, 31402),
    }  # fmt: skip
    for (n, factor, alpha, h), want in table.items():
        call, got = f"room({n}, {factor}, {alpha}, {h})", room(n, factor, alpha, h)
        assert len(got) == 2, f"{call}: return the first and the last label, as a tuple"
        assert all(int(v) == v for v in got), f"{call}: labels are whole numbers, round down"
        assert tuple(got) == want, f"{call} should be {want}, not {tuple(got)}"


@exercise("10-sigma")
def _(sigma):
    def left_out(value):
        draw = lambda rng: cream_positions(64, 64, rng, sigma=value, k=4)  # noqa: E731
        return coverage(draw, 64, 64, examples=1000, seed=0).missed_distances

    assert sigma is not None and sigma is not ... and sigma == int(sigma) and sigma >= 1, (
        "sigma is a whole number of half windows"
    )
    missed = left_out(sigma)
    assert missed <= 0.05, (
        f"with sigma {sigma} none of 1,000 rows holds {missed:.1%} of the distances: widen it"
    )
    assert sigma == 1 or left_out(sigma - 1) > 0.05, f"sigma {sigma} covers, and so does {sigma - 1}"


@exercise("10-visible")
def _(visible):
    rng = np.random.default_rng(0)
    rows = [[0, 1, 2, 3], [0, 1, 9, 10, 11, 20], [0, 5, 9], [4, 5, 6], [0, 1, 1, 2], [0, 1, 2, 0, 1]]
    rows += [cream_positions(24, 8, rng, k=3).tolist() for _ in range(4)]
    for labels in rows:
        want = [1]
        for before, now in zip(labels, labels[1:], strict=False):
            want.append(want[-1] + 1 if now == before + 1 else 1)
        got = list(visible(labels))
        assert len(got) == len(labels), f"visible({labels}): one number for each token"
        assert got[0] == 1, f"visible({labels}): the first token sees itself"
        assert got == want, f"visible({labels}) should be {want}, not {got}"
