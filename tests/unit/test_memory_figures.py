"""The figures of chapter 6 show where tokens were in a real run, and draw the numbers they were given."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcx.figures import memory as figures


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()


@pytest.mark.parametrize("overflow", ["flush", "roll"])
def test_trace_names_every_token_once_and_in_its_place(model, overflow):
    steps = figures.trace(model, 36, 22, window=8, last_context=6, overflow=overflow)
    assert [s.new for s in steps[:3]] == [list(range(8)), list(range(8, 16)), list(range(16, 22))]
    assert [s.new for s in steps[3:]] == [[t] for t in range(22, 36)]
    for s in steps:
        read = list(range(s.new[-1] + 1))
        assert [*s.memory, *s.local, *s.new] == read  # the memory holds the oldest, in the order of storing
        here = [*s.local, *s.new]
        assert s.positions == dict.fromkeys(s.memory, 0) | {t: i for i, t in enumerate(here)}
        assert list(s.other_positions) == here
        there = [s.other_positions[t] for t in here]
        assert there == list(range(there[0], there[0] + len(here)))
    local = [len(s.local) for s in steps]
    assert local == ([0, 0, 0, 6, 7] + ([0, *range(1, 8), 0, 1, 2, 3] if overflow == "flush" else [7] * 12))
    assert (steps[-1].other_positions[35] > 7) == (overflow == "roll")


def test_timeline_shows_the_steps(model):
    runs = {o: figures.trace(model, 36, 22, window=8, last_context=6, overflow=o) for o in ("flush", "roll")}
    fig = figures.timeline(runs, 22)
    assert [c["name"] for c in fig.layout.meta["controls"]] == ["overflow", "step"]
    frame = next(f for f in fig.frames if f.name == "0.5")  # flush, the first token after it
    other, memory = frame.data[0].z
    assert list(memory) == [0] * 24 + [2] + [None] * 11
    assert list(other) == [None] * 24 + [2] + [None] * 11
    assert frame.data[1].y[:24] == (0,) * 24 and "24 in the memory" in frame.layout.xaxis.title.text
    for frame in fig.frames:
        assert "reads token" in frame.layout.xaxis.title.text
        assert all(len(row) == 36 for row in frame.data[0].z)


def test_found_draws_means_and_intervals_inside_0_to_100():
    series = {"a": {64: [1.0, 1.0, 1.0], 4096: [0.5, 0.6, 0.7]}, "a, top-k": {64: [0.9], 4096: [0.02]}}
    fig = figures.found(series, trained=3072)
    assert list(fig.data[0].y) == [100, 60] and fig.data[0].error_y.array[1] == pytest.approx(24.84, abs=0.01)
    assert not fig.data[1].error_y.visible and list(fig.data[1].y) == [90, 2]
    wide = figures.found({"a": {64: [0.1, 0.5, 0.9]}}).data[0]
    assert wide.y[0] + wide.error_y.array[0] == 100 and wide.y[0] - wide.error_y.arrayminus[0] == 0


def test_by_lookup_shows_each_size_of_the_rows():
    rows = [
        {"model": m, "seed": s, "tokens": t, "top_k": k, "accuracy": 0.5 + 0.1 * s, "answer_seconds": t / 1e4,
         "memory_bytes": 512 * t}
        for m in ("a", "b") for s in (0, 1) for t in (64, 4096) for k in (None, 32)
    ]  # fmt: skip
    fig = figures.by_lookup(rows, ["a", "b"], layers=4, start=64)
    assert list(fig.data[0].y) == ["a, dense", "a, top 32", "b, dense", "b, top 32"]
    assert [c["values"] for c in fig.layout.meta["controls"]] == [["64", "4,096"]]
    accuracy, seconds, size = fig.frames[1].data
    assert list(accuracy.x) == [55] * 4 and list(seconds.x) == [409.6] * 2 and list(size.x) == [2, 8]
