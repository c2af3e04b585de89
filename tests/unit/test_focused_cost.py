"""The budgets of the windowed prefill: the procedures agree, and the committed measurement keeps what was promised."""

import pytest
import torch

import lcx
from lcx.measure import focused_cost as cost


def test_both_procedures_give_the_same_logits(monkeypatch):
    for name, value in (("LENGTH", 96), ("WINDOW", 16), ("LAYERS", (0, 2))):
        monkeypatch.setattr(cost, name, value)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    monkeypatch.setattr(cost, "SHAPE", {**shape, "num_key_value_heads": 2, "vocab_size": 32000})
    model, ids = cost.random_model(), cost.prompt()
    mine, theirs = cost.ours(model, ids), cost.transcription(model, ids)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert (model(ids[:, -16:]).logits[:, -1] - mine).abs().max() > 1e-3, "the memory matters"


def test_the_committed_measurement_is_within_budget():
    measured = lcx.result("focused-cost")
    assert measured["length"] == 16384 and measured["relative_difference"] < 1e-4
    assert measured["times_faster"] >= 3 and measured["times_less_memory"] >= 2
    times = [row["append_ms"] for row in measured["append"]]
    slots = [row["slots"] for row in measured["append"]]
    assert slots[-1] / slots[-2] == 2 and times[-1] < 1.5 * times[-2], (
        "adding a window does not cost more in a full memory"
    )
    assert measured["append"][-1]["concatenate_ms"] > 5 * times[-1]


@pytest.mark.slow
def test_append_times_are_measured_on_a_growing_memory(monkeypatch):
    monkeypatch.setattr(cost, "FULL", (2048, 4096))
    rows = cost._append_times()
    assert [r["slots"] for r in rows] == [2048, 4096] and all(r["append_ms"] > 0 for r in rows)
