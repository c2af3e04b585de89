"""What position labels cost: the measurement runs, and the committed figures are within the budget."""

import numpy as np
import torch

import lcx
from lcx.finetune_cream import PositionLabels
from lcx.measure import cream_cost as cost


def test_the_measurement_at_small_size(monkeypatch):
    sizes = dict(ROWS=3, TOKENS=128, DRAWS=5, STEP_ROWS=2, STEP_TOKENS=128, PAIRS=6)
    for name, size in sizes.items():
        monkeypatch.setattr(cost, name, size)
    monkeypatch.setattr(cost, "SHAPE", cost.SHAPE | {"hidden_size": 32, "intermediate_size": 64})
    batches, call = [], PositionLabels.__call__
    monkeypatch.setattr(PositionLabels, "__call__", lambda *x: batches.append(call(*x)) or batches[-1])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    made = cost.cream_cost()
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert len(batches) == 7 and all(b["position_ids"].shape == (2, 128) for b in batches)
    assert all(b["position_ids"][:, -1].eq(128 * 8 - 1).all() and b["attention_mask"].all() for b in batches)
    assert made["labels"]["ms"].keys() == {"cream", "cream-released", "pose", "randpos"}
    assert all(0 < x["low"] <= x["median"] <= x["high"] for x in made["labels"]["ms"].values())
    step = made["step"]
    assert (
        step["pairs"] == 6 and 0 < step["low"] <= step["ratio"] <= step["high"] and step["hidden_size"] == 32
    )
    assert step["labels_ms"] > 0 and step["plain_ms"] > 0
    assert 0 < step["wall"]["low"] <= step["wall"]["ratio"] <= step["wall"]["high"]


def test_the_samplers_timed_draw_what_they_are_called():
    rows = lambda: [np.random.default_rng([0, i]) for i in range(4)]  # noqa: E731
    drawn = {name: draw(rows()) for name, draw in cost.samplers(256).items()}
    for name, options in (("cream", {}), ("cream-released", {"release": True})):
        assert (drawn[name] == lcx.cream_positions(256, 8, rows(), **options)).all()
    assert (drawn["pose"] == lcx.pose_positions(256, 8, rows())).all()
    assert (drawn["randpos"] == lcx.randpos_positions(256, 8, rows())).all()


def test_the_committed_figures_are_within_the_budget():
    found = lcx.result("cream-cost")
    assert (found["labels"]["rows"], found["labels"]["tokens"]) == (cost.ROWS, cost.TOKENS)
    assert found["labels"]["ms"]["cream"]["median"] < 2 and found["labels"]["ms"]["pose"]["median"] < 2
    assert found["step"]["pairs"] == cost.PAIRS and found["step"]["ratio"] <= 1.02
    assert found["made_by"]["command"] == "lcx measure cream-cost"
