"""Chapter 9: reach and scores against their definitions, and figures that draw what was computed."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lcx
from lcx.figures import scaling as figures
from lcx.methods.reach import beyond, reach, scaled, score_by_distance
from lcx.methods.rope import rope, rope_frequencies, unseen_angle

SMALL = {"window": 256, "rope_theta": 1e4, "head_dim": 32}  # lm-256
METHODS = ("none", "linear", "ntk", "yarn", "yarn_harmonic")


@pytest.mark.parametrize("method", METHODS)
def test_scaled_is_what_a_scaled_model_uses(method):
    with torch.random.fork_rng():
        sizes = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=256, **sizes))
    frequencies, multiplier = scaled(method, 8, **SMALL)
    with lcx.scale_rope(model, method, 8):
        assert torch.equal(frequencies, model.model.rotary_emb.inv_freq.double())
        assert multiplier == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert multiplier == pytest.approx(0.1 * math.log(8) + 1 if "yarn" in method else 1)


@pytest.mark.parametrize("method", METHODS)
def test_reach_is_where_the_first_unseen_angle_is(method):
    before, now = rope_frequencies(32), scaled(method, 8, **SMALL)[0]
    n = reach(before, now, 256)
    last, after = torch.tensor([n - 1]), torch.tensor([n])
    assert beyond(torch.arange(n), before, now, 256).max() < 1e-4
    assert beyond(after, before, now, 256).max() > beyond(last, before, now, 256).max()
    assert n == {"none": 256, "linear": 2041, "yarn": 2041, "yarn_harmonic": 2041}.get(method, n)
    if method == "ntk":  # the first pair without a full turn has index 7
        assert n == 1 + math.floor(255 * 8 ** (14 / 30))


def test_beyond_without_scaling_is_unseen_angle_and_reach_needs_a_limit():
    f, x = rope_frequencies(32), torch.arange(0, 700, 7)
    torch.testing.assert_close(beyond(x, f, f, 256), unseen_angle(x, f, 256))
    with pytest.raises(ValueError, match="every pair turned fully"):
        reach(torch.tensor([1.0]), torch.tensor([0.5]), 256)


def test_scores_are_those_of_rope_and_linear_stretches_them():
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f, x = rope_frequencies(32), torch.arange(40)
    want = [rope(q[None], torch.tensor([d]))[0] @ k / 32**0.5 for d in range(40)]
    torch.testing.assert_close(score_by_distance(q, k, x, f), torch.stack(want))
    torch.testing.assert_close(score_by_distance(q, k, 8 * x, f / 8), torch.stack(want))
    torch.testing.assert_close(score_by_distance(q, k, x, f, 1.2), 1.44 * torch.stack(want))


def test_divisions_draw_the_division_of_each_pair():
    fig = figures.divisions({"lm-256": SMALL}, [2, 8])
    linear, ntk, yarn, harmonic = fig.frames[1].data
    assert set(linear.y) == {8} and ntk.y[0] == 1 and ntk.y[-1] == 8
    assert (
        yarn.y[0] == 1
        and set(yarn.y[7:]) == {8}
        and all(a <= b for a, b in zip(yarn.y, harmonic.y, strict=True))
    )
    assert fig.frames[1].layout.shapes[0].x0 == 6.5


def test_clocks_put_stretched_hands_back_on_their_arcs():
    fig = figures.clocks([3, 7, 11], [8], [0, 255, 2040], **SMALL)
    by = {f.name: f for f in fig.frames}
    assert "0 of all 16" in by["0.0.1"].layout.title.text and " 0 of all" not in by["0.0.2"].layout.title.text
    for method in (1, 3):  # linear and YaRN reach eight windows, NTK does not
        assert " 0 of all 16" in by[f"{method}.0.2"].layout.title.text
        assert set(by[f"{method}.0.2"].data[0].marker.symbol) == {"circle"}
    assert "x" in by["2.0.2"].data[0].marker.symbol
    assert by["1.0.2"].data[0].x == by["0.0.1"].data[0].x, "distance 2040 looks as 255 did"


def test_score_figure_says_where_the_peak_went():
    f = rope_frequencies(32)
    cos, sin = f.cos(), f.sin()  # a query that answers best to the key one token back
    q = torch.cat([cos, -sin])
    k = torch.cat([torch.ones(16), torch.zeros(16)])
    fig = figures.scores({"one back": (q, k)}, [8], 20, 100, **SMALL)
    linear = fig.frames[0]
    assert "at distance 8<br>(without scaling at 1)" in linear.layout.title.text
    assert len(linear.data[0].y) == 21 and len(linear.data[1].y) == 129


def test_the_other_figures_draw_their_numbers():
    curves = {2: {"a": {64: 1.5}, "b": {64: 2.0}}, 8: {"a": {64: 3.0, 128: 4.0}}}
    fig = figures.by_factor(curves, window=64, xaxis="x", yaxis="y", start=2, ticks=[1, 2])
    assert fig.frames[1].data[0].y == (3, 4) and fig.frames[1].data[1].x == () and fig.data[1].y == (2,)
    fig = figures.by_factor({8: curves[8]}, window=64, xaxis="x", yaxis="y", start=8)
    assert not fig.frames and fig.data[0].y == (3, 4), "one factor needs no slider"
    fig = figures.pair_costs({"a": [1, 2]}, "y")
    assert list(fig.data[0].y) == [1, 2]
    fig = figures.reach_edge({"none": (256, 300.4)})
    assert (fig.data[1].x, fig.data[1].y) == ((256,), (300,))


def test_shown_distances_are_selfextend_s():
    fig = figures.shown_distances([1, 8], [128], 1024, 256)
    same, grouped = fig.frames
    assert list(same.data[0].y) == list(fig.data[0].x) and "outside" in same.layout.title.text
    assert max(grouped.data[0].y) in (239, 240) and "inside" in grouped.layout.title.text
    assert list(grouped.data[0].y[:20]) == list(fig.data[0].x[:20])
