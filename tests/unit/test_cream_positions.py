import functools
import math
import time

import numpy as np
import pytest

from lcx.errors import LcxError
from lcx.methods import cream
from lcx.methods.coverage import coverage


def runs(p):
    return np.diff(np.r_[0, np.flatnonzero(np.diff(p) != 1) + 1, len(p)])


def test_cream_invariants_over_random_settings():
    meta = np.random.default_rng(0)
    for _ in range(300):
        n, factor = int(meta.integers(16, 8193)), int(meta.integers(2, 65))
        k = int(meta.integers(1, (n - 1) // 2 + 1))
        release = bool(meta.random() < 0.5)
        p = cream.cream_positions(
            n, factor, np.random.default_rng(int(meta.integers(1 << 30))), k=k, release=release
        )
        length = n * factor
        assert p.dtype == np.int64 and p.shape == (n,) and p[0] == 0 and p[-1] == length - 1
        assert (np.diff(p) >= 1).all()
        r = runs(p)
        assert len(r) <= 3
        if len(r) == 3:
            assert r[0] == r[2] and r[0] in (k, n // 3)


@pytest.mark.parametrize("n,factor,k", [(12, 4, 1), (64, 8, 4)])
def test_both_ends_of_the_middle_are_reached(n, factor, k):
    """Continuity, alpha at its two ends: the middle touches the head and touches the tail."""
    p = cream.cream_positions(
        n, factor, np.random.default_rng(0), k=k, p_relativity=0, release=True, sigma=50.0, size=4000
    )
    starts = p[:, k]
    assert starts.min() == k  # alpha = 1 glues the middle to the head
    assert p[:, n - k - 1].max() == n * factor - k - 1  # alpha = factor can glue it to the tail


def test_end_range_has_the_stated_size():
    """For fixed alpha (sigma so large that the release piles half the mass on alpha = factor) P_e spans (alpha-1)(2h+1)."""
    n, factor, k = 12, 4, 1
    p = cream.cream_positions(
        n, factor, np.random.default_rng(1), k=k, p_relativity=0, release=True, sigma=1e6, size=20000
    )
    ends = p[:, n - k - 1]
    top = ends[ends > (factor - 0.5) * n - k - 1]
    assert top.max() - (k + (n - 2 * k - 1) * factor) == (factor - 1) * (2 * k + 1)


def test_worked_table_for_4096_times_8():
    """The ranges of P_e of the specification: alpha = 1 and 8 in both designs, by exhausting many draws."""
    rng = np.random.default_rng(2)
    for p_rel, h, lo8, hi8 in ((0, 32, 32280, 32735), (1, 1365, 12285, 31402)):
        p = cream.cream_positions(4096, 8, rng, p_relativity=p_rel, release=True, sigma=1e6, size=3000)
        ends = p[:, 4096 - h - 1]
        assert ends.min() == 4096 - h - 1
        assert lo8 <= ends.max() <= hi8


def release_pmf(factor, sigma):
    phi = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
    mu = 1 + factor
    r = np.arange(2, 2 * factor + 1)
    p = np.array([phi((x + 1 - mu) / sigma) - phi((x - mu) / sigma) for x in r])
    p[0] += phi((2 - mu) / sigma)
    p[-1] = 1 - phi((2 * factor - mu) / sigma)
    return r / 2, p


def test_release_alpha_follows_its_exact_table():
    values, pmf = release_pmf(8, 3.0)
    np.testing.assert_allclose(pmf[[0, 6, 14]], [0.0228, 0.1306, 0.0098], atol=6e-5)
    a = cream.sample_alpha(8, np.random.default_rng(3), sigma=3.0, size=200_000, release=True)
    got = np.array([(a == v).sum() for v in values])
    assert got.sum() == len(a)
    chi2 = ((got - pmf * len(a)) ** 2 / (pmf * len(a))).sum()
    assert chi2 < 36.1  # 14 degrees of freedom, p = 0.001


def ks(a, factor, sigma):
    phi = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    lo, hi = phi((1 - factor) / sigma), phi((factor - 1) / sigma)
    a = np.sort(a)
    cdf = (phi((2 * a - 1 - factor) / sigma) - lo) / (hi - lo)
    i = np.arange(1, len(a) + 1) / len(a)
    return max((i - cdf).max(), (cdf - i + 1 / len(a)).max()) * math.sqrt(len(a))


def test_exact_alpha_is_the_truncated_gaussian_and_the_release_is_not():
    exact = cream.sample_alpha(8, np.random.default_rng(4), sigma=3.0, size=200_000)
    clipped = cream.sample_alpha(8, np.random.default_rng(4), sigma=3.0, size=200_000, release=True)
    assert ks(exact, 8, 3.0) < 1.63  # p = 0.01
    assert ks(clipped, 8, 3.0) > 3


def test_coin_is_flipped_for_each_example():
    p = cream.cream_positions(4096, 8, np.random.default_rng(5), size=4000)
    relativity = (p[:, 1364] == 1364) & (p[:, 1365] != 1365)
    assert abs(relativity.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)


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
    "bad",
    [
        dict(n=2, factor=8),
        dict(n=64, factor=8),  # the default k = 32 leaves no middle
        dict(n=4096, factor=0),
        dict(n=4096, factor=1.5),
        dict(n=4096, factor=8, sigma=0),
        dict(n=4096, factor=8, k=0),
    ],
)
def test_bad_input_is_one_clear_line(bad):
    with pytest.raises(LcxError) as e:
        cream.cream_positions(**bad)
    assert "\n" not in str(e.value)


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


# distance bands of section 1.7 of the specification: [1,N) [N,2N) then fractions of L
BANDS = [
    (0, 1 / 8),
    (1 / 8, 2 / 8),
    (0.25, 0.375),
    (0.375, 0.5),
    (0.5, 0.625),
    (0.625, 0.75),
    (0.75, 0.875),
    (0.875, 0.97),
    (0.97, 1),
]
PUBLISHED = {
    "pose": (
        [0.779, 0.142, 0.141, 0.149, 0.140, 0.138, 0.146, 0.086, 0.017],
        lambda r: cream.pose_positions(4096, 8, r),
    ),
    "continuity": (
        [0.986, 0.141, 0.323, 0.416, 0.417, 0.321, 0.140, 0.059, 0.094],
        lambda r: cream.cream_positions(4096, 8, r, release=True, p_relativity=0),
    ),
    "relativity": (
        [0.385, 0.202, 0.237, 0.169, 0.202, 0.242, 0.154, 0.588, 1.0],
        lambda r: cream.cream_positions(4096, 8, r, release=True, p_relativity=1),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.slow
def test_coverage_matches_the_table(name):
    expected, draw = PUBLISHED[name]
    c = coverage(draw, 4096, 8, examples=3000)
    got = [c.band(lo, hi) for lo, hi in BANDS]
    np.testing.assert_allclose(got, expected, atol=0.01)


def test_coverage_of_scattered_labels_equals_brute_force():
    rng = np.random.default_rng(9)
    p = cream.randpos_positions(40, 8, rng)
    c = coverage(lambda _: p, 40, 8, examples=1)
    brute = np.zeros(320)
    brute[(p[:, None] - p[None])[np.tril_indices(40, -1)]] = 1
    assert (c.distance == brute).all()


@pytest.mark.slow
def test_the_hole_at_factor_64_and_its_cure():
    released = coverage(lambda r: cream.cream_positions(4096, 64, r, release=True), 4096, 64, examples=1000)
    scaled = coverage(lambda r: cream.cream_positions(4096, 64, r), 4096, 64, examples=3000)
    assert released.missed_distances > 0.2 and released.missed_labels > 0.5
    assert scaled.missed_distances < 0.01
