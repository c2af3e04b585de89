"""Chapter 7: its figures show what the grouped softmax does, and draw the numbers they are given."""

import pytest
import torch

import lcx
from lcx.figures import landmark as figures

ROW = [0.2, 1.0, 0.5, -0.3, 0.9, 1.5, 0.1, 0.7, 2.0]


def frame(fig, *at):
    return next(f for f in fig.frames if f.name == ".".join(map(str, at)))


@pytest.mark.parametrize("block_size", [2, 3, 4, 5])
def test_roles_are_what_the_grouped_softmax_makes_of_a_key(block_size):
    """Found out by moving one score: does the weight of the key itself, or of anything else, change?"""
    T = 12
    scores = torch.randn(T, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = lcx.grouped_softmax(scores, block_size)
    own = torch.arange(T)[:, None] // block_size == torch.arange(T) // block_size
    for j in range(T):
        moved = scores.clone()
        moved[:, j] += 1
        change = (lcx.grouped_softmax(moved, block_size) - weights).abs() > 1e-9
        for i in range(T):
            role = figures.role(i, j, block_size)
            if role in (figures.IGNORED, figures.FUTURE):
                assert weights[i, j] == 0 and not change[i].any()
            elif role == figures.OWN:
                assert weights[i, j] > 0 and own[i, j]
            elif role == figures.GATE:  # it gets nothing, and moves what its block gets
                assert weights[i, j] == 0 and change[i, j - block_size + 1 : j].all()
            else:  # it divides what its block gets and moves nothing else
                assert role == figures.BEHIND and weights[i, j] > 0 and not own[i, j]
                assert set(change[i].nonzero().flatten().tolist()) <= set(
                    range(j // block_size * block_size, j // block_size * block_size + block_size)
                )


def test_who_sees_what_draws_every_cell_once_in_each_block_size():
    fig = figures.who_sees_what(9, [3, 4], start=4)
    for at in (0, 1):
        cells = [(i, j) for t in frame(fig, at).data for i, j in zip(t.y, t.x, strict=True)]
        assert len(cells) == len(set(cells)) == 81
    kinds = dict(zip(figures.MARKS, frame(fig, 0).data, strict=True))
    assert (2, 2) in zip(kinds[figures.IGNORED].y, kinds[figures.IGNORED].x, strict=True)
    assert "query L8, key L5: landmark of an earlier block: a gate" in kinds[figures.GATE].text


def test_mass_flows_from_each_landmark_to_its_block():
    main, below = figures.mass(ROW, 7, 3)
    assert [j for j, *_ in main] == [2, 5, 6, 7] and [j for j, *_ in below] == [0, 1, 3, 4, 6, 7]
    for segments in (main, below):  # without gaps, from 0 to 1
        assert segments[0][1] == 0 and segments[-1][2] == pytest.approx(1)
        assert all(a[2] == pytest.approx(b[1]) for a, b in zip(segments, segments[1:], strict=False))
    shares = {j: b - a for j, a, b in [*main, *below]}
    assert {j: round(shares[j], 4) for j in (0, 1, 2, 5)} == {0: 0.0553, 1: 0.1230, 2: 0.1783, 5: 0.4845}
    assert dict((j, b) for j, _, b in main)[2] == pytest.approx(dict((j, b) for j, _, b in below)[1])
    # a landmark as query ignores itself; a token of the first block has no gate
    assert [j for j, *_ in figures.mass(ROW, 8, 3)[0]] == [2, 5, 6, 7]
    assert figures.mass(ROW, 1, 3)[0] == figures.mass(ROW, 1, 3)[1]


def test_flow_shows_the_moved_score_and_what_it_does():
    moves = {"score of L2": (2, [0.5, 3.0]), "score of token 4": (4, [0.9, 3.0])}
    fig = figures.flow(ROW, 3, [1, 7], moves, start={"query": 7})
    assert [c["name"] for c in fig.layout.meta["controls"]] == ["query", "score of L2", "score of token 4"]
    before, after = frame(fig, 1, 0, 0).data, frame(fig, 1, 1, 0).data
    assert before[0].y == tuple(ROW) and after[0].y[2] == 3.0

    def width(data, key):
        return sum(x for x, t in zip(data[1].x, data[1].text, strict=True) if t.split("<")[0] == key)

    assert width(after, "L2") > 2 * width(before, "L2") and width(after, "0") > 2 * width(before, "0")
    inside = frame(fig, 1, 0, 1).data
    assert width(inside, "L5") == width(before, "L5") and width(inside, "4") > width(before, "4")
    assert frame(fig, 0, 1, 1).data[1].x == frame(fig, 0, 0, 0).data[1].x  # query 1 sees neither
    still = figures.flow(ROW, 3, [7])
    assert not still.frames and still.data[1].x == before[1].x


def test_weights_map_marks_weight_on_landmarks_and_rows_that_do_not_sum_to_one():
    right = lcx.grouped_softmax(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), 3)
    wrong = right.clone()
    wrong[2, 2], wrong[4, 0] = 0.5, 0
    fig = figures.weights_map({"right": right.tolist(), "wrong": wrong.tolist()}, [2, 5])
    heat, marks = frame(fig, 0).data
    assert not marks.x and heat.z[0][1] is None and heat.z[0][0] == 1
    assert list(frame(fig, 0).layout.yaxis.ticktext) == ["0", "1", "L2", "3", "4", "L5"]
    _, marks = frame(fig, 1).data
    assert (marks.x, marks.y) == ((2,), (2,))
    assert frame(fig, 1).layout.yaxis.ticktext[2] == "L2, sum 1.50"


def test_gates_frames_the_wanted_blocks():
    maps = {"a": [[0.1, 0.2], [0.3, 0.4]], "b": [[0.0, 1.0], [0.5, 0.25]]}
    fig = figures.gates(maps, ["q0", "q1"], [1], "b")
    assert [list(r) for r in fig.data[0].z] == maps["b"]
    assert [list(r) for r in frame(fig, 0).data[0].z] == maps["a"]
    [box] = fig.layout.shapes
    assert (box.x0, box.x1) == (0.5, 1.5)


def test_own_share_and_cost_draw_what_they_are_given():
    fig = figures.own_share([64, 128], {"a": [0.5, 1 / 3], "b": [0.1, 0.01]})
    assert list(fig.data[0].y) == [50, 33.33333] and list(fig.data[1].y) == [10, 1]
    rows = [
        {"method": m, "tokens": t, "seconds": t / 1000, "mib": t / 64} for m in ("x", "y") for t in (64, 128)
    ]
    fig = figures.cost(rows)
    assert [t.name for t in fig.data if t.showlegend] == ["x", "y"]
    assert list(fig.data[0].y) == [0.064, 0.128] and list(fig.data[1].y) == [1, 2]
