"""The figures of chapter 10 draw the labels, coverage and measured numbers they were given."""

from functools import partial

import numpy as np
import pytest

import lcx
from lcx.figures import coverage as cover
from lcx.figures import cream as figures
from lcx.measure.cream import summary, t_interval


def covered_by(line, length):
    """The labels under a line of `run_lines`."""
    ends = [round(x * length) for x in line["x"] if x is not None]
    return [p for a, b in zip(ends[::2], ends[1::2], strict=True) for p in range(a, b)]


@pytest.mark.parametrize(
    "design", ["CREAM", "continuity alone", "relativity alone", "PoSE", "ordinary labels"]
)
def test_run_lines_hold_exactly_the_labels(design):
    rows = cover.designs(64, 8)[design](np.random.default_rng(0), size=5)
    for row in rows:
        lines = cover.run_lines(row[None], 512)
        assert sorted(p for line in lines for p in covered_by(line, 512)) == row.tolist()
        assert 0 in covered_by(lines[0], 512)
        assert bool(lines[2]["x"]) == (row[-1] == 511 and len(lines[1]["x"]) > 0)


def test_run_lines_of_scattered_labels_are_thinned():
    row = lcx.randpos_positions(4096, 8, np.random.default_rng(0))
    line = cover.run_lines(row[None], 32768)[0]
    starts = np.array(line["x"][::3])
    assert 30 <= len(starts) <= 60 and np.abs(starts[:, None] - row / 32768).min(1).max() < 1e-4


def test_covered_is_what_coverage_counts_row_by_row():
    draw = partial(lcx.cream_positions, 64, 8, k=4)
    rows = draw(np.random.default_rng(3), size=50)
    got = cover.covered(draw, 64, 8, 50, seed=3)
    distance, label = np.zeros(512), np.zeros(512)
    for row in rows:
        label[row] += 1 / 50
        distance[np.unique(abs(row[:, None] - row))[1:]] += 1 / 50
    np.testing.assert_allclose(got.distance, distance, atol=1e-12)
    np.testing.assert_allclose(got.label, label, atol=1e-12)
    assert cover.binned(distance, 4) == [
        round(100 * distance[a : a + 128].mean(), 1) for a in (0, 128, 256, 384)
    ]


def test_rows_of_keeps_names_and_places():
    fig = cover.rows_of({"a": np.arange(8), "b": lcx.pose_positions(8, 4, np.random.default_rng(1))}, 32)
    assert list(fig.layout.yaxis.ticktext) == ["a", "b"]
    assert fig.data[0].x[:2] == (0, 8) and fig.data[1].y[0] == 1 and not fig.data[2].x


def test_explorer_frames():
    fig = cover.explorer((64, 256), (2, 8), {"N": 64, "factor": 8, "design": "PoSE"}, examples=20)
    assert len(fig.frames) == 2 * 2 * 6
    ordinary = next(f for f in fig.frames if f.name == "0.1.5")  # N 64, factor 8
    assert set(ordinary.data[3].y[6:]) == {0} and ordinary.data[3].y[0] == 100 and not ordinary.data[1].x
    assert ordinary.data[4].y[0] == 800  # all of the labels in an eighth of the text
    randpos = next(f for f in fig.frames if f.name == "0.1.4")
    assert min(randpos.data[3].y[:24]) > 90
    assert "512" in ordinary.layout.title.text and "never" not in ordinary.layout.title.text


def test_spread_shows_the_hole_and_the_piles():
    start = {"factor": 64, "sigma": 3, "k": 64, "Gaussian": "released: clipped, floored"}
    fig = cover.spread(1024, (8, 64), (3, 24), (64,), start, examples=150)
    frames = {f.name: f.data for f in fig.frames}
    assert list(fig.data[0].y) == list(frames["1.0.0.1"][0].y), "it opens with the hole"
    hole, wide = (list(frames[name][1].y) for name in ("1.0.0.1", "1.1.0.0"))
    assert hole.count(0) > 8 > wide.count(0)
    cut, piled = (list(frames[name][0].y) for name in ("0.1.0.0", "0.1.0.1"))  # factor 8, sigma 24
    assert max(cut) < 10 and piled[-1] > 35 and sum(piled[:8]) > 35
    for share in (cut, piled):
        assert sum(share) == pytest.approx(100, abs=2)


ROWS = [
    {"arm": arm, "scaling": "yarn", "seed": seed, "accuracy": {"64": [1.0] * 9, "512": [level + 0.01 * seed] * 8 + [0.0]}}
    for arm, level in (("pose", 0.5), ("cream", 0.6)) for seed in range(3)
]  # fmt: skip
NAMES = {"pose": "PoSE", "cream": "CREAM"}


def test_by_length_and_by_depth_draw_means_and_intervals():
    result = summary(ROWS, [("cream", "pose")])
    fig = figures.by_length(result["means"], NAMES, ["yarn"], 64)
    want = t_interval([8 / 9 * (0.6 + 0.01 * s) for s in range(3)])
    assert fig.data[1].name == "CREAM" and fig.data[1].y == (100, round(100 * want["mean"], 1))
    assert fig.data[1].error_y.array[1] == pytest.approx(100 * (want["high"] - want["mean"]), abs=0.01)
    assert fig.data[1].error_y.array[0] == 0  # at 100 % nothing can be above
    assert fig.layout.shapes[0].x0 == 64 and not fig.frames
    fig = figures.by_depth(ROWS, NAMES, ["yarn"], start={"tokens": 512})
    assert [f.data[0].y[0] for f in fig.frames] == [100, 51] and fig.data[1].y == (61,) * 8 + (0,)
    assert fig.data[0].customdata == tuple(12.5 * d for d in range(9))


def test_one_seed_has_no_bars_and_a_missing_arm_no_points():
    fig = figures.by_depth(ROWS[:1], NAMES, ["yarn"], start={"tokens": 64})
    assert fig.data[0].error_y.visible is False and len(fig.data[0].y) == 9 and not fig.data[1].y
    fig = figures.by_length(summary(ROWS[:1], [])["means"], NAMES, ["yarn", "linear"], 64)
    assert [len(f.data[0].y or ()) for f in fig.frames] == [2, 0]


def test_differences_are_paired():
    paired = summary(ROWS, [("cream", "pose")])["paired"]
    fig = figures.differences(paired, NAMES, 512)
    everywhere, middle = fig.data
    assert everywhere.x[0] == pytest.approx(10 * 8 / 9, abs=0.01)
    assert middle.x[0] == pytest.approx(10) and middle.customdata == ([3, 3],)
    assert everywhere.error_x.array[0] == pytest.approx(0, abs=0.01)  # each seed has the same difference
    assert fig.layout.yaxis.ticktext == ("CREAM − PoSE<br>yarn",)


def test_attention_hides_what_comes_later():
    a, b = np.eye(4), np.tril(np.full((4, 4), 0.25))
    fig = figures.attention({"no mask": a, "mask": b}, [2])
    first, second = (f.data[0].z for f in fig.frames)
    assert list(first[1][:2]) == [0, 100]
    assert second[3][0] == 25 and second[0][1] is None
    assert [s.x0 for s in fig.layout.shapes if s.x0 == s.x1] == [1.5]
