"""What SelfExtend promises beyond the matrix: its distances, its attention and whole models against slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import lcx
from lcx import SelfExtend
from lcx.errors import LcxError, UnsupportedModelError
from lcx.methods import selfextend
from lcx.methods.rope import rope_cos_sin, rope_frequencies

from . import reference
from .conftest import logits, tiny_model, tokens

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
GROUPS = [
    (1, 5),
    (2, 8),
    (3, 8),
    (4, 8),
    (5, 7),
    (8, 3),
    (7, 1),
]  # some divide the neighbour window, some do not


def shown(i: int, j: int, G: int, W: int) -> int:
    """The distance of section 3.2, for a query at i and a key at j."""
    return i - j if i - j < W else math.floor(i / G) + W - math.floor(W / G) - math.floor(j / G)


@pytest.mark.parametrize(("G", "W"), GROUPS)
def test_distances_are_the_definition(G, W):
    n = 50
    got = lcx.selfextend_distances(torch.arange(n), torch.arange(n), G, W)
    assert got.dtype == torch.int64 and got.shape == (n, n)
    assert got.tolist() == [[shown(i, j, G, W) for j in range(n)] for i in range(n)]
    past = got.tril()
    assert past.max() <= W + (n - W) / G + 1 and past.min() == 0
    true = torch.arange(n)[:, None] - torch.arange(n)
    assert torch.equal(got[:W, :W], true[:W, :W])  # as long as the text fits the neighbour window
    assert torch.equal(got, true) == (G == 1)
    # A key farther away is never shown nearer, nor does a later query see a key nearer: no order is turned around.
    assert (past[:, :-1] - past[:, 1:])[true[:, 1:] >= 0].min() >= (0 if W % G == 0 else -1)


def test_distances_of_a_batch_and_of_the_last_queries():
    whole = lcx.selfextend_distances(torch.arange(40), torch.arange(40), 3, 8)
    start = torch.tensor([[0], [7]])
    got = lcx.selfextend_distances(start + torch.arange(4), torch.arange(40).expand(2, -1), 3, 8)
    assert torch.equal(got, torch.stack([whole[0:4], whole[7:11]]))


def by_definition(q, k, v, i, j, frequencies, G, W, real):
    """One pair at a time: the query is turned by the distance it is shown, the key not at all."""
    out = torch.zeros_like(q)
    B, H, T, D = q.shape
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for t in range(T):
                seen = [s for s in range(k.shape[2]) if real[b, s] and j[b, s] <= i[b, t]]
                if not seen:
                    continue
                far = torch.tensor([shown(int(i[b, t]), int(j[b, s]), G, W) for s in seen])
                angle = far[:, None].double() * frequencies
                x, y = q[b, h, t].split(D // 2)
                turned = torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()], -1)
                weights = ((turned * k[b, g, seen]).sum(-1) / math.sqrt(D)).softmax(-1)
                out[b, h, t] = weights @ v[b, g, seen]
    return out


def example(dtype=torch.float64, T=14, S=20):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, 10, generator=g, dtype=dtype) for h, n in ((4, T), (2, S), (2, S)))
    real = torch.ones(2, S, dtype=torch.bool)
    real[0, :9] = False  # so that some queries of row 0 are padding too
    real[1, -2:] = False
    j = (real.cumsum(1) - 1).clamp(min=0)
    return q, k, v, j[:, -T:], j, real


@pytest.mark.parametrize(("G", "W"), GROUPS)
@pytest.mark.parametrize("tile", [2**25, 4 * 8 * 20 * 3, 1], ids=["whole", "tiles of 3", "tiles of 1"])
def test_attention_is_the_definition(G, W, tile, monkeypatch):
    monkeypatch.setattr(selfextend, "TILE_BYTES", tile)
    q, k, v, i, j, real = example()
    f = rope_frequencies(10, 100.0)
    got = lcx.selfextend_attention(q, k, v, i, j, *rope_cos_sin(torch.arange(40), f), G, W, real=real)
    assert_close(got, by_definition(q, k, v, i, j, f, G, W, real), atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_the_definition_also_in_tiles(monkeypatch):
    q, k, v, i, j, real = example()
    f, grads = rope_frequencies(10, 100.0), []
    table, w = rope_cos_sin(torch.arange(40), f), example()[0].flip(-1)
    for tile in (2**25, 4 * 8 * 20 * 3, None):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if tile:
            monkeypatch.setattr(selfextend, "TILE_BYTES", tile)
            out = lcx.selfextend_attention(*inputs, i, j, *table, 3, 4, real=real)
        else:
            out = by_definition(*inputs, i, j, f, 3, 4, real)
        (out * w * real[:, None, -14:, None]).sum().backward()
        grads.append([x.grad for x in inputs])
    for got in grads[:2]:
        for a, b in zip(got, grads[2], strict=True):
            assert_close(a, b, atol=1e-11, rtol=1e-11)


def reference_selfextend(model, ids, G, W):
    """float64 logits [T, V] of one sequence ids [T]: the model of reference.py, its keys turned for each query anew."""
    c, w = model.config, reference._weights(model)
    d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    x = w["model.embed_tokens.weight"][ids]
    for n in range(c.num_hidden_layers):
        layer, rows = reference._layer(w, n), []
        h = reference._norm(x, layer["input_layernorm.weight"], c)
        q, k, v = (reference._project(layer, c, h, name) for name in "qkv")
        for t in range(len(ids)):
            # A key at distance m is one at position -m for a query that is not turned.
            turned = reference._rotate(
                k[: t + 1], -torch.tensor([shown(t, j, G, W) for j in range(t + 1)]), c
            )
            scores = torch.einsum("hd,jhd->hj", q[t], turned.repeat_interleave(group, 1)) / math.sqrt(d)
            values = v[: t + 1].repeat_interleave(group, 1)
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), values).flatten())
        x = x + torch.stack(rows) @ layer["self_attn.o_proj.weight"].T
        x = x + reference._mlp(layer, c, x)
    return reference._head(w, c, x)


@pytest.mark.parametrize(("G", "W"), [(4, 8), (3, 8), (5, 1)])
def test_agrees_with_the_float64_definition(model, G, W):
    ids = tokens(length=40)
    wanted = reference_selfextend(model, ids[0], G, W)
    with SelfExtend(G, W)(model):
        assert_close(logits(model, ids)[0].double(), wanted, **TOLERANCE)
        cache = DynamicCache(config=model.config)  # read 17 tokens, then decode
        pieces = [logits(model, x, past_key_values=cache) for x in ids.split((17, *(1,) * 23), 1)]
        assert_close(torch.cat(pieces, 1)[0].double(), wanted, **TOLERANCE)


def test_padded_prompts_go_on_in_pieces(model):
    """As generate does it: a mask over all tokens so far, one new token for each row."""
    rows = [tokens(length=30), tokens(length=19, seed=1)]
    ids = torch.cat([rows[0], torch.cat([torch.zeros(1, 11, dtype=torch.long), rows[1]], 1)])
    mask, got = (ids > 0).long(), []
    with SelfExtend(3, 8)(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for a, b in ((0, 16), (16, 25), *((n, n + 1) for n in range(25, 30))):
            got.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits)
        got = torch.cat(got, 1)
        assert_close(got[:1], logits(model, rows[0]), **TOLERANCE)
        assert_close(got[1:, 11:], logits(model, rows[1]), **TOLERANCE)


def test_group_size_one_is_the_plain_model(model):
    ids = tokens(rows=2, length=40)
    plain = logits(model, ids)
    with SelfExtend(1, 8)(model):
        assert_close(logits(model, ids), plain, **TOLERANCE)


def test_far_text_is_seen_at_no_distance_beyond_the_window():
    """The point of it: at `longest` tokens every angle is one the model has met."""
    model = tiny_model("llama", max_position_embeddings=32)
    with SelfExtend(4, 8)(model) as extended:
        n = extended.longest
    assert n == (32 - 8) * 4 + 8 == 104
    assert lcx.selfextend_distances(torch.arange(n), torch.arange(n), 4, 8).max() == 31


def test_loss_embeddings_beams_and_sampling_work_inside():
    model, ids = tiny_model("llama"), tokens(rows=2, length=30)
    with SelfExtend(3, 8)(model), torch.no_grad():
        out = model(ids, labels=ids)
        by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(out.loss, by_hand)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert_close(embedded, out.logits, **TOLERANCE)
        last = model(ids, logits_to_keep=1, use_cache=False)
        assert last.past_key_values is None
        assert_close(last.logits, out.logits[:, -1:], **TOLERANCE)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
        beams = model.generate(ids, num_beams=3, do_sample=False, **options)
        without = model.generate(ids, num_beams=3, do_sample=False, use_cache=False, **options)
        assert torch.equal(beams, without)
        assert model.generate(ids, do_sample=True, **options).shape == (2, 35)


def test_rope_scaling_is_kept():
    ids = tokens(length=30)
    model = tiny_model("llama")
    with lcx.scale_rope(model, "yarn", factor=4):
        scaled = logits(model, ids)
        with SelfExtend(1, 4)(model):
            assert_close(logits(model, ids), scaled, **TOLERANCE)
        with SelfExtend(4, 4)(model):
            assert (logits(model, ids) - scaled).abs().max() > 1e-2


def one_line(error) -> str:
    assert "\n" not in str(error.value) and ": " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ((0, 8), "group_size must be a whole number of at least 1, got 0"),
        ((2.5, 8), "group_size must be a whole number of at least 1, got 2.5"),
        ((4, 0), "neighbor_window must be a whole number of at least 1, got 0"),
        ((4, 257), "neighbor_window 257 is more than the model's window of 256"),
    ],
    ids=str,
)
def test_bad_settings_are_one_clear_line(groups, words):
    model = tiny_model("llama")
    with pytest.raises(LcxError) as e, SelfExtend(*groups)(model):
        pass
    assert words in str(e.value) and "\n" not in str(e.value)
    if "more than" not in words:
        with pytest.raises(LcxError, match=words):
            lcx.selfextend_distances(torch.arange(3), torch.arange(3), *groups)


def test_models_it_cannot_stretch_are_refused():
    model = tiny_model("llama")
    with lcx.scale_rope(model, "dynamic"), pytest.raises(LcxError) as e, SelfExtend(4, 8)(model):
        pass
    assert "dynamic RoPE changes" in one_line(e)
    with pytest.raises(LcxError) as e, SelfExtend(4, 8)(tiny_model("mistral", sliding_window=16)):
        pass
    assert "sliding window of 16" in one_line(e)
    with pytest.raises(UnsupportedModelError), SelfExtend(4, 8)(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    "other", [SelfExtend(4, 8), lcx.FocusedAttention((1,)), lcx.LandmarkAttention(8, landmark_id=96)], ids=str
)
def test_two_methods_at_once_are_refused(other):
    model = tiny_model("llama")
    for first, second in ((other, SelfExtend(4, 8)), (SelfExtend(4, 8), other)):
        with first(model), pytest.raises(LcxError) as e, second(model):
            pass
        assert "already inside a method" in one_line(e)


def test_caches_of_others_are_refused():
    model, ids = tiny_model("llama"), tokens()
    used = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=used)
    with SelfExtend(4, 8)(model):
        ours = model(ids).past_key_values
        for cache in (used, StaticCache(config=model.config, max_cache_len=64)):
            with pytest.raises(LcxError) as e:
                logits(model, ids, past_key_values=cache)
            assert "start with an empty DynamicCache" in one_line(e)
        with pytest.raises(LcxError) as e:
            logits(model, ids, past_key_values=ours, attention_mask=torch.ones_like(ids), position_ids=None)
        assert "all tokens seen so far" in one_line(e)
    with lcx.FocusedAttention((1,))(model), pytest.raises(LcxError, match="must be empty"):
        logits(model, ids, past_key_values=ours)
