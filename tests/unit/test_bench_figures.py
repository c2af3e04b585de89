"""The figures of the test bench show the counts they were given, and intervals that are Wilson's."""

import pytest

from lcx.evaluate import table, wilson_interval
from lcx.figures import bench

ROWS = [
    {
        "length": x,
        "depth": d,
        "hit": (x + i) % 3 > 0 and d < 1,
        "right": 5 if (x + i) % 3 and d < 1 else 2,
        "of": 5,
    }
    for x in (512, 1024, 16384)
    for d in (0.0, 0.5, 1.0)
    for i in range(4)
    if (x, d) != (16384, 0.5)
]
CELLS = table(ROWS, "length", "depth")


def shown(fig, haystack: int, metric: int):
    return next(f for f in fig.frames if f.name == f"{haystack}.{metric}").data[0]


def test_heat_map_shows_counts_and_leaves_unmeasured_cells_empty():
    fig = bench.heat_map({"filler": CELLS, "prose": CELLS[:1]}, window=8192)
    assert len(fig.frames) == 2 * len(bench.METRICS)
    at = {(c["length"], c["depth"]): c for c in CELLS}
    for m, entry in enumerate(bench.METRICS.values()):
        frame = shown(fig, 0, m)
        for row, depth in enumerate((0.0, 0.5, 1.0)):
            for column, length in enumerate((512, 1024, 16384)):
                cell = at.get((length, depth))
                if cell is None:
                    assert frame.z[row][column] is None and frame.text[row][column] == ""
                    continue
                assert frame.z[row][column] == round(100 * cell[entry])
                count = f"{cell['hits']}/{cell['n']}"
                assert frame.text[row][column] == (
                    f"{frame.z[row][column]} %" if entry == "digits" else count
                )
    only = [v for row in shown(fig, 1, 0).z for v in row if v is not None]
    assert only == [round(100 * CELLS[0]["accuracy"])]
    assert fig.data[0].z == shown(fig, 0, 0).z  # what is seen before a control is moved


def test_by_length_has_wilson_bars_and_the_window_after_the_last_length_inside():
    cells = table(ROWS, "length")
    fig = bench.by_length({"one": cells}, window=8192)
    line = fig.data[0]
    for y, up, down, c in zip(line.y, line.error_y.array, line.error_y.arrayminus, cells, strict=True):
        low, high = wilson_interval(c["hits"], c["n"])
        assert (y + up, y - down) == (pytest.approx(100 * high, abs=0.11), pytest.approx(100 * low, abs=0.11))
    assert fig.layout.shapes[0].x0 == 1.5  # 512 and 1,024 are inside, 16,384 is not
    assert not bench.by_length({"one": cells}, window=20_000).layout.shapes


def test_interval_width_draws_the_interval_of_the_nearest_count():
    fig = bench.interval_width((100, 80))
    low, high, seen = (next(f for f in fig.frames if f.name == "1").data[i].y for i in range(3))
    n = bench.SIZES.index(5)
    assert seen[n] == 80.0
    assert (low[n], high[n]) == tuple(bench.percent(v) for v in wilson_interval(4, 5))


def test_context_use_and_intervals_keep_every_row():
    cells = [{**c, "context": c["length"]} for c in table(ROWS, "length")]
    lines = [{"context": c["context"], "perplexity": 20.0 - i} for i, c in enumerate(cells)]
    fig = bench.context_use(lines, cells)
    assert list(fig.data[0].y) == [20.0, 19.0, 18.0]
    assert [tuple(v) for v in fig.data[1].customdata] == [(c["hits"], c["n"]) for c in cells]
    fig = bench.intervals([(f"task {i}", c) for i, c in enumerate(cells)])
    assert list(fig.data[0].y) == ["task 0", "task 1", "task 2"]
