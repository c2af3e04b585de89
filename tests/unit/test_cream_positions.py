"""Position labels: what each row promises, over random settings. Their distribution is tests/unit/test_cream_distribution.py."""

import functools
import math
import time

import numpy as np
import pytest

from lcx.errors import LcxError
from lcx.methods import cream


def runs(p):
    return np.diff(np.r_[0, np.flatnonzero(np.diff(p) != 1) + 1, len(p)])


@pytest.fixture
def fixed_alpha(monkeypatch):
    """Middles that end in the block the test says: fixed_alpha(2.5)."""

    def fix(alpha):
        draw = lambda factor, rng, *, sigma, size, release=False: np.full(size, float(alpha))  # noqa: E731
        monkeypatch.setattr(cream, "sample_alpha", draw)

    return fix


def test_cream_is_head_middle_and_tail_over_random_settings():
    meta = np.random.default_rng(0)
    for _ in range(300):
        n, factor = int(meta.integers(16, 8193)), int(meta.integers(2, 65))
        k = int(meta.integers(1, (n - 1) // 2 + 1))
        relativity, release = int(meta.integers(2)), bool(meta.integers(2))
        rng = np.random.default_rng(int(meta.integers(1 << 30)))
        p = cream.cream_positions(n, factor, rng, k=k, p_relativity=relativity, release=release)
        length, h = n * factor, n // 3 if relativity else k
        assert p.dtype == np.int64 and p.shape == (n,) and p[0] == 0 and p[-1] == length - 1
        assert (np.diff(p) >= 1).all() and len(runs(p)) <= 3
        start, end = p[h], p[n - h - 1]
        assert h <= start and end <= length - h - 1 and end - start == n - 2 * h - 1
        whole = [np.arange(h), np.arange(start, end + 1), np.arange(length - h, length)]
        assert (p == np.concatenate(whole)).all()


@pytest.mark.parametrize("relativity", [0, 1])
@pytest.mark.parametrize(("n", "factor", "k"), [(12, 4, 1), (13, 4, 2), (16, 2, 3)])
def test_the_middle_ends_anywhere_in_its_range_and_nowhere_else(fixed_alpha, n, factor, k, relativity):
    """P_e ~ U{int(h + (m-1) alpha) ... alpha n - h - 1}, exhausted for every half block (specification, section 1.4)."""
    h = n // 3 if relativity else k
    m = n - 2 * h
    for alpha in np.arange(2, 2 * factor + 1) / 2:
        fixed_alpha(alpha)
        p = cream.cream_positions(
            n, factor, np.random.default_rng(0), k=k, p_relativity=relativity, size=4000
        )
        low, high = int(h + (m - 1) * alpha), math.floor(alpha * n) - h - 1
        assert set(p[:, n - h - 1].tolist()) == set(range(low, high + 1))
        assert abs(high - low - (alpha - 1) * (2 * h + 1)) < 1
        if alpha == 1:  # the middle is glued to the head
            assert (p[:, : n - h] == np.arange(n - h)).all()
        if alpha == factor:  # and here it can touch the tail
            assert high == n * factor - h - 1


# The ranges of P_e for 4,096 x 8 in section 1.4 of the specification: alpha, continuity, relativity
RANGES = [
    (1, (4063, 4063), (2730, 2730)),
    (1.5, (6078, 6111), (3412, 4778)),
    (2, (8094, 8159), (4095, 6826)),
    (4, (16156, 16351), (6825, 15018)),
    (4.5, (18171, 18399), (7507, 17066)),
    (6, (24218, 24543), (9555, 23210)),
    (8, (32280, 32735), (12285, 31402)),
]


class Ends:
    """A generator that draws the lower or the upper end of what it is asked for."""

    def __init__(self, upper):
        self.upper = upper

    def random(self, size):
        return np.zeros(size)

    def integers(self, low, high, endpoint):
        return high if self.upper else low


@pytest.mark.parametrize("row", RANGES, ids=lambda row: str(row[0]))
def test_worked_table_for_4096_times_8(fixed_alpha, row):
    alpha, *ranges = row
    fixed_alpha(alpha)
    for relativity, (h, of_ends) in enumerate(zip((32, 1365), ranges, strict=True)):
        got = [cream.cream_positions(4096, 8, Ends(u), p_relativity=relativity) for u in (False, True)]
        assert tuple(p[4096 - h - 1] for p in got) == of_ends


def test_deterministic_and_no_global_state():
    state = np.random.get_state()[1].copy()
    a = cream.cream_positions(256, 8, np.random.default_rng([7, 3]))
    b = cream.cream_positions(256, 8, np.random.default_rng([7, 3]))
    assert (a == b).all() and (np.random.get_state()[1] == state).all()


SAMPLERS = {
    "cream": functools.partial(cream.cream_positions, 65, 8, k=4),
    "released": functools.partial(cream.cream_positions, 64, 8, k=4, release=True),
    "pose": functools.partial(cream.pose_positions, 65, 8),
    "randpos": functools.partial(cream.randpos_positions, 64, 8),
    "factor 1": functools.partial(cream.cream_positions, 64, 1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_list_of_generators_draws_each_row_as_its_own_would_alone(name):
    draw = SAMPLERS[name]
    generators = lambda: [np.random.default_rng([1, i]) for i in (7, 2, 7, *range(100))]  # noqa: E731
    batch = draw(generators())
    assert batch.dtype == np.int64 and (batch[0] == batch[2]).all()
    assert (batch == np.stack([draw(g) for g in generators()])).all()


def test_labels_of_a_batch_are_drawn_in_less_than_half_the_time_of_row_by_row():
    draw = functools.partial(cream.cream_positions, 4096, 8)
    generators = lambda: [np.random.default_rng([0, i]) for i in range(32)]  # noqa: E731
    ways = {"batch": lambda: draw(generators()), "rows": lambda: np.stack([draw(g) for g in generators()])}
    seconds = {name: [] for name in ways}
    for _ in range(15):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    assert min(seconds["batch"]) < min(seconds["rows"]) / 2


def test_factor_one_is_the_plain_order():
    assert (cream.cream_positions(100, 1) == np.arange(100)).all()
    assert (cream.pose_positions(100, 1) == np.arange(100)).all()
    assert (cream.randpos_positions(100, 1) == np.arange(100)).all()
    assert (cream.longrecipe_positions([40, 60], 1) == np.arange(100)).all()


@pytest.mark.parametrize(
    "draw",
    [cream.cream_positions, cream.pose_positions, cream.randpos_positions],
    ids=lambda draw: draw.__name__,
)
@pytest.mark.parametrize(
    ("n", "factor", "words"),
    [
        (2, 8, "window n must be at least 3, got 2"),
        (4096, 0, "factor must be a whole number of at least 1, got 0"),
        (4096, -3, "whole number"),
        (4096, 1.5, "whole number of at least 1, got 1.5"),
        (4096, float("nan"), "whole number"),
        (4096, float("inf"), "whole number"),
    ],
)
def test_bad_windows_and_factors_are_one_clear_line(draw, n, factor, words):
    with pytest.raises(LcxError, match=words) as e:
        draw(n, factor)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n=64, factor=8), "k = 32 leaves no middle in a window of 64: use a whole number from 1 to 31"),
        (dict(n=4096, factor=512), "k = 2048 leaves no middle"),
        (dict(n=4096, factor=8, k=0), "k = 0 leaves no middle"),
        (dict(n=64, factor=8, k=4.5), "k = 4.5 .* use a whole number"),
        (dict(n=4096, factor=8, sigma=0), "sigma must be positive, got 0"),
        (dict(n=4096, factor=8, sigma=-1), "sigma must be positive"),
        (dict(n=4096, factor=8, sigma=float("nan")), "sigma must be positive"),
        (dict(n=4096, factor=8, relative_sigma=0), "sigma must be positive"),
    ],
    ids=str,
)
def test_bad_settings_of_cream_are_one_clear_line(options, words):
    with pytest.raises(LcxError, match=words) as e:
        cream.cream_positions(**options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("lengths", [[], [3, 0, 4], [[3, 4]], [1, 1]], ids=str)
def test_bad_sentences_are_one_clear_line(lengths):
    with pytest.raises(LcxError):
        cream.longrecipe_positions(lengths, 4)


def test_other_samplers_keep_their_promises():
    rng = np.random.default_rng(8)
    for p in (
        *cream.pose_positions(4096, 8, rng, size=50),
        *cream.randpos_positions(1024, 8, rng, size=20),
        *(cream.longrecipe_positions(rng.integers(5, 40, size=50), 4, rng) for _ in range(20)),
    ):
        assert p.dtype == np.int64 and p[0] >= 0 and (np.diff(p) >= 1).all()
    pose = cream.pose_positions(4096, 8, rng, size=2000)
    assert (pose[:, 0] == 0).all() and max(len(runs(p)) for p in pose) == 2
    assert pose.max() <= 4096 * 8 - 1
    lengths = [7, 11, 13, 29]
    p = cream.longrecipe_positions(lengths, 6, rng)
    rho_run = runs(p)[0]
    for start, size in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        if start > rho_run:
            assert (np.diff(p[start : start + size]) == 1).all()  # a sentence stays whole
