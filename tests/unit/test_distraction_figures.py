"""The figures of the distraction issue draw the numbers they were given, and the slider's masses are exact."""

import pytest
import torch

from lcx import lane_contexts, positive_share
from lcx.figures import distraction
from lcx.methods.focused import crossbatch_attention


def masses(d: int, documents: int = 8) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    q, k = (2 * torch.randn(2 * documents, 2, 6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return crossbatch_attention(q, k, k, lane_contexts(documents, d), return_mass=True)[1][documents:]


def test_interval_is_students():
    assert distraction.interval([0.4]) == (0.4, 0.0)
    mid, half = distraction.interval([1.0, 2.0, 6.0])
    # 4.303 is the 97.5 % point for 2 degrees of freedom; the standard error is sqrt(7 / 3)
    assert (mid, half) == (pytest.approx(3.0), pytest.approx(4.303 * (7 / 3) ** 0.5))
    for n, t in distraction.STUDENT.items():  # against a simulation: 95 % of intervals hold the true mean 0
        draws = torch.randn(40_000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        inside = draws.mean(1).abs() <= t * draws.std(1) / n**0.5
        assert inside.double().mean().item() == pytest.approx(0.95, abs=0.005)


def test_pile_shows_the_attention_a_run_with_fewer_documents_has():
    documents = (1, 2, 5, 8)
    change = {"one": {d: 0.1 * d for d in documents}}
    fig = distraction.pile({"one": masses(8)}, change, start=2)
    assert [c["values"] for c in fig.layout.meta["controls"]] == [["1", "2", "5", "8"]]
    for frame, d in zip(fig.frames, documents, strict=True):
        bar, marker = frame.data
        run = 100 * masses(d).flatten(0, -2).mean(0)
        assert list(bar.x) == pytest.approx([*run.tolist(), *[0.0] * (8 - d)], abs=0.006)
        assert bar.base[0] == 0 and bar.base[1] == pytest.approx(run[0].item(), abs=0.006)
        assert bar.base[-1] + bar.x[-1] == pytest.approx(100, abs=0.02)
        assert list(marker.x) == [d] and list(marker.y) == [pytest.approx(0.1 * d)]
    assert len(fig.data[0].marker.color) >= len(fig.data[0].y) == len(fig.data[0].customdata) == 9
    assert list(fig.data[0].x) == list(fig.frames[1].data[0].x)  # it starts where it is told to


def test_share_and_harm_draw_means_and_intervals_beside_one_over_d():
    series = {"a": {1: [1.0, 1.0, 1.0], 8: [0.5, 0.6, 0.7]}, "b": {1: [1.0] * 3, 8: [0.1] * 3}}
    other = {"a": {1: [1.0] * 3, 8: [0.4] * 3}, "b": {1: [1.0] * 3, 8: [0.2] * 3}}
    fig = distraction.share(series, {"first": series, "second": other})
    assert list(fig.data[0].y) == [100, 60] and fig.data[0].error_y.array[1] == pytest.approx(24.84, abs=0.01)
    assert list(fig.data[-1].x) == [1, 8] and list(fig.data[-1].y) == [100, 12.5]
    assert list(fig.frames[1].data[0].y) == [100, 40] and fig.frames[1].data[0].error_y.array[1] == 0
    assert not distraction.share({"a": {1: [1.0], 8: [0.5]}}).data[0].error_y.visible
    fig = distraction.harm({"a": {1: [-0.1, -0.3, -0.2]}})
    assert list(fig.data[0].y) == [-0.2] and fig.layout.shapes[0].y0 == 0


def test_weights_map_puts_each_group_of_keys_under_its_name():
    weights = torch.eye(3, 9)
    fig = distraction.weights_map(weights, ["window", "own", "foreign"])
    assert [list(row) for row in fig.data[0].z] == (100 * weights).tolist()
    assert [(a.text, a.x) for a in fig.layout.annotations] == [("window", 1), ("own", 4), ("foreign", 7)]
    assert [s.x0 for s in fig.layout.shapes] == [2.5, 5.5]


def test_positive_share_of_one_recording_holds_for_fewer_documents():
    assert torch.allclose(positive_share(masses(8)[..., :4]), positive_share(masses(3)))
