"""Position labels: the laws they are drawn from, and which distances they cover (specification, sections 1.3, 1.7 and 6.2)."""

import functools

import numpy as np
import pytest
from scipy import stats

from lcx.methods import cream
from lcx.methods.coverage import coverage

EXACT, RELEASED = {}, {"release": True}


def truncated(factor, sigma):
    mean = 1 + factor
    return stats.truncnorm((2 - mean) / sigma, (2 * factor - mean) / sigma, mean, sigma)


@pytest.mark.parametrize(("factor", "sigma"), [(8, 3.0), (64, 24.0), (64, 3.0), (2, 3.0)])
@pytest.mark.parametrize("size", [20_000, 200_000])
def test_exact_alpha_is_the_truncated_gaussian(factor, sigma, size):
    r = 2 * cream.sample_alpha(factor, np.random.default_rng(4), sigma=sigma, size=size)
    assert stats.kstest(r, truncated(factor, sigma).cdf).pvalue > 0.01
    assert r.min() >= 2 and r.max() <= 2 * factor


def test_released_alpha_is_not_even_before_it_is_floored():
    """The mass beyond the ends is piled on them, .0098 on each side at factor 8."""
    u = np.random.default_rng(4).random(200_000)
    got = stats.kstest(cream._clipped(u, 8, 3.0), truncated(8, 3.0).cdf)
    assert got.pvalue < 1e-12 and got.statistic == pytest.approx(0.0098, abs=0.003)
    floored = cream.sample_alpha(8, np.random.default_rng(4), sigma=3.0, size=200_000, release=True)
    assert stats.kstest(2 * floored, truncated(8, 3.0).cdf).pvalue < 1e-100


# alpha: probability at factor 8 and sigma 3, as printed in section 1.3 of the specification
PMF = [0.0228, 0.0250, 0.0434, 0.0674, 0.0938, 0.1170, 0.1306, 0.1306, 0.1170, 0.0938, 0.0674, 0.0434, 0.0250, 0.0129, 0.0098]  # fmt: skip


@pytest.mark.parametrize(("factor", "sigma"), [(8, 3.0), (4, 3.0), (2, 3.0), (16, 6.0)])
def test_released_alpha_follows_its_exact_table(factor, sigma):
    r = np.arange(2, 2 * factor + 1)
    cdf = stats.norm(1 + factor, sigma).cdf
    pmf = np.diff(
        np.r_[0, cdf(r[1:]), 1]
    )  # what is clipped goes to the ends, and 2f is reached by clipping alone
    if factor == 8:
        np.testing.assert_allclose(pmf, PMF, atol=6e-5)
    a = cream.sample_alpha(factor, np.random.default_rng(3), sigma=sigma, size=200_000, release=True)
    got = [(a == v / 2).sum() for v in r]
    assert sum(got) == len(a)
    assert stats.chisquare(got, pmf * len(a)).pvalue > 0.001


@pytest.mark.parametrize("p_relativity", [0.5, 0.2])
def test_the_coin_is_flipped_for_each_row(p_relativity):
    n, k = 66, 4
    draw = [
        cream.cream_positions(n, 8, np.random.default_rng(5), k=k, p_relativity=p_relativity, size=4000),
        cream.cream_positions(
            n, 8, [np.random.default_rng([5, i]) for i in range(4000)], k=k, p_relativity=p_relativity
        ),
    ]
    for p in draw:
        relativity = (p[:, -n // 3] == 8 * n - n // 3) & (p[:, -n // 3 - 1] != 8 * n - n // 3 - 1)
        # alpha = 8 with the middle at the tail looks like neither; it comes once in some thousand rows
        assert stats.binomtest(int(relativity.sum()), len(p), p_relativity).pvalue > 0.001
        pairs = np.bincount(
            2 * relativity[::2] + relativity[1::2], minlength=4
        )  # one says nothing of the next
        shares = np.outer([1 - p_relativity, p_relativity], [1 - p_relativity, p_relativity]).ravel()
        assert stats.chisquare(pairs, shares * len(p) / 2).pvalue > 0.001


@pytest.mark.parametrize(("relativity", "h"), [(0, 4), (1, 21)])
@pytest.mark.parametrize("alpha", [1.5, 3, 8])
def test_the_end_of_the_middle_is_uniform_given_alpha(monkeypatch, relativity, h, alpha):
    monkeypatch.setattr(cream, "sample_alpha", lambda *_, size, **__: np.full(size, float(alpha)))
    p = cream.cream_positions(64, 8, np.random.default_rng(6), k=4, p_relativity=relativity, size=50_000)
    low, high = int(h + (63 - 2 * h) * alpha), int(alpha * 64) - h - 1
    got = np.bincount(p[:, 63 - h] - low, minlength=high - low + 1)
    assert len(got) == high - low + 1 and stats.chisquare(got).pvalue > 0.001


@pytest.mark.parametrize("n", [64, 512])
@pytest.mark.parametrize("options", [EXACT, RELEASED], ids=["exact", "released"])
def test_a_run_covers_every_distance_at_factor_8(n, options):
    rows = iter(
        cream.cream_positions(n, 8, np.random.default_rng(0), sigma=3.0, k=n // 16, size=3000, **options)
    )
    assert coverage(lambda _: next(rows), n, 8, examples=3000).missed_distances == 0


@pytest.mark.parametrize(("relativity", "h"), [(0, 8), (1, 42), (0.5, 8)])
def test_the_distances_from_tail_to_head_are_in_every_row(relativity, h):
    draw = lambda rng: cream.cream_positions(128, 8, rng, k=8, p_relativity=relativity)  # noqa: E731
    c = coverage(draw, 128, 8, examples=200)
    assert (c.distance[1024 - 2 * h + 1 :] == 1).all() and c.distance[1024 - 2 * h] < 1


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
released = functools.partial(cream.cream_positions, release=True)
# Probability of a distance in each band, and the share of the labels in each third
PUBLISHED = {
    "pose": (
        functools.partial(cream.pose_positions, 4096, 8),
        [0.779, 0.142, 0.141, 0.149, 0.140, 0.138, 0.146, 0.086, 0.017],
        [0.47, 0.29, 0.24],
    ),
    "continuity": (
        functools.partial(released, 4096, 8, p_relativity=0),
        [0.986, 0.141, 0.323, 0.416, 0.417, 0.321, 0.140, 0.059, 0.094],
        [0.25, 0.60, 0.15],
    ),
    "relativity": (
        functools.partial(released, 4096, 8, p_relativity=1),
        [0.385, 0.202, 0.237, 0.169, 0.202, 0.242, 0.154, 0.588, 1.0],
        [0.52, 0.14, 0.34],
    ),
    "cream": (
        functools.partial(released, 4096, 8),
        [0.679, 0.181, 0.273, 0.293, 0.308, 0.279, 0.153, 0.324, 0.553],
        [0.39, 0.36, 0.25],
    ),
    "randpos": (
        functools.partial(cream.randpos_positions, 1024, 8),
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.998, 0.754],
        [0.33, 0.33, 0.33],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.slow
def test_coverage_matches_the_table(name):
    draw, bands, thirds = PUBLISHED[name]
    n = 1024 if name == "randpos" else 4096
    c = coverage(draw, n, 8, examples=1000 if name == "randpos" else 3000)
    np.testing.assert_allclose([c.band(low, high) for low, high in BANDS], bands, atol=0.01)
    mass = [third.sum() / c.label.sum() for third in np.array_split(c.label, 3)]
    np.testing.assert_allclose(mass, thirds, atol=0.015)  # printed with two digits


@pytest.mark.parametrize(
    "draw",
    [cream.randpos_positions, cream.pose_positions, functools.partial(cream.cream_positions, k=3)],
    ids=["scattered", "two runs", "three runs"],
)
def test_coverage_equals_brute_force(draw):
    drawn = draw(40, 8, np.random.default_rng(9), size=20)
    rows = iter(drawn)
    c = coverage(lambda _: next(rows), 40, 8, examples=20)
    distance, label = np.zeros(320), np.zeros(320)
    for p in drawn:
        distance[np.unique((p[:, None] - p)[np.tril_indices(40, -1)])] += 1
        label[p] += 1
    np.testing.assert_allclose(c.distance, distance / 20, atol=1e-12)
    np.testing.assert_allclose(c.label, label / 20, atol=1e-12)


@pytest.mark.slow
def test_the_hole_at_factor_64_and_its_cure():
    released = coverage(lambda r: cream.cream_positions(4096, 64, r, release=True), 4096, 64, examples=1000)
    scaled = coverage(lambda r: cream.cream_positions(4096, 64, r), 4096, 64, examples=3000)
    assert released.missed_distances > 0.2 and released.missed_labels > 0.5
    assert scaled.missed_distances < 0.01
