"""Grouped softmax and its blocked form against equations 1 to 4 of the paper written key by key, and what must hold of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import lcx
from lcx.errors import LcxError
from lcx.methods import landmark
from tests.contracts.reference import landmark_place, landmark_weights

EXACT = {"atol": 1e-10, "rtol": 1e-10}
STORED = Path(__file__).with_name("landmark_reference.json")


def numbers(seed: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    """float64 in -spread … spread, the same in every version of torch."""
    source, count = random.Random(seed), torch.Size(shape).numel()
    return torch.tensor([source.uniform(-spread, spread) for _ in range(count)], dtype=torch.float64).view(
        shape
    )


def visible(K, i, block_size, mask=None, documents=None) -> list[int]:
    """The keys that query i may see. A landmark none of whose tokens exists stands for nothing and is not seen."""

    def seen(j):
        exists = mask is None or bool(mask[j])
        same = documents is None or documents[j // block_size] == documents[i // block_size]
        return j <= i and exists and same

    keys = [j for j in range(K) if seen(j)]
    regular = {landmark_place(j, block_size) for j in keys if landmark_place(j, block_size) != j}
    return [j for j in keys if landmark_place(j, block_size) in regular]


def row_weights(scores, i, block_size, mask=None, documents=None) -> torch.Tensor:
    """The definition for query i: scores [K] -> weights [K]."""
    keys = visible(len(scores), i, block_size, mask, documents)
    if not keys:
        return scores * 0
    p = [landmark_place(j, block_size) for j in keys]
    weights = landmark_weights(scores[keys], keys, p, landmark_place(i, block_size))
    return torch.zeros_like(scores).scatter(0, torch.tensor(keys), weights)


def defined_weights(scores, block_size) -> torch.Tensor:
    """The definition for scores [..., Q, K]."""
    Q, K = scores.shape[-2:]
    rows = scores.reshape(-1, K)
    return torch.stack([row_weights(row, K - Q + n % Q, block_size) for n, row in enumerate(rows)]).view_as(
        scores
    )


def defined_attention(q, k, v, block_size, mask=None, documents=None) -> torch.Tensor:
    (B, H, Q, D), (Hkv, K) = q.shape, k.shape[1:3]
    out = []
    for b in range(B):
        for h in range(H):
            kv = h * Hkv // H
            for t in range(Q):
                scores = k[b, kv] @ q[b, h, t] / D**0.5
                row = [None if x is None else x[b] for x in (mask, documents)]
                out.append(row_weights(scores, K - Q + t, block_size, *row) @ v[b, kv])
    return torch.stack(out).view_as(q)


# name: (B, H, Hkv, Q, K, D, block_size)
SHAPES = {
    "whole blocks": (1, 1, 1, 9, 9, 2, 3),
    "incomplete last block, GQA": (2, 4, 2, 11, 11, 3, 4),
    "last queries, from the start of a block": (1, 2, 1, 7, 15, 4, 4),
    "last queries, from inside a block": (1, 2, 2, 6, 17, 2, 5),
    "one query, a landmark": (1, 2, 1, 1, 9, 3, 3),
    "one query, the first of its block": (2, 2, 1, 1, 10, 3, 3),
    "blocks of one token": (1, 1, 1, 7, 7, 3, 2),
    "no landmark yet": (1, 2, 2, 5, 5, 3, 8),
}


def inputs(name: str):
    B, H, Hkv, Q, K, D, block_size = SHAPES[name]
    seed = 10 * list(SHAPES).index(name)
    tensors = numbers(seed, B, H, Q, D), numbers(seed + 1, B, Hkv, K, D), numbers(seed + 2, B, Hkv, K, D)
    return [t.requires_grad_() for t in tensors], block_size


def results(attention, q, k, v, block_size, **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of a fixed weighted sum of it."""
    out = attention(q, k, v, block_size, **options)
    grads = torch.autograd.grad((out * numbers(99, *out.shape)).sum(), (q, k, v))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


# Values computed once -----------------------------------------------------------------------------------------------


def compute() -> dict:
    stored = {}
    for name in SHAPES:
        values = results(defined_attention, *inputs(name)[0], inputs(name)[1])
        stored[name] = {key: [float(f"{x:.12g}") for x in t.flatten().tolist()] for key, t in values.items()}
    return stored


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("attention", [defined_attention, lcx.landmark_attention])
def test_agrees_with_stored_values(attention, name):
    tensors, block_size = inputs(name)
    got, stored = results(attention, *tensors, block_size), json.loads(STORED.read_text())[name]
    for key, value in got.items():
        assert_close(value.flatten(), torch.tensor(stored[key], dtype=torch.float64), **EXACT, msg=key)


@pytest.mark.parametrize("name", SHAPES)
def test_the_readable_definition_agrees_as_well(name):
    def attention(q, k, v, block_size):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return lcx.grouped_softmax(q @ k.mT / q.shape[-1] ** 0.5, block_size) @ v

    tensors, block_size = inputs(name)
    wanted = results(defined_attention, *tensors, block_size)
    for key, value in results(attention, *tensors, block_size).items():
        assert_close(value, wanted[key], **EXACT, msg=key)


# The weights --------------------------------------------------------------------------------------------------------

WORKED = torch.tensor([0.2, 1.0, 0.5, -0.3, 0.9, 1.5, 0.1, 0.7, 2.0], dtype=torch.float64)
SQUARES = [(9, 3), (10, 4), (7, 2), (13, 5), (24, 8)]  # (T, block_size)


def is_landmark(K, block_size):
    return torch.arange(K) % block_size == block_size - 1


def test_worked_example_to_four_decimals():
    weights = lcx.grouped_softmax(WORKED.expand(9, 9), 3)
    wanted = {
        1: [0.3100, 0.6900, 0, 0, 0, 0, 0, 0, 0],
        4: [0.1054, 0.2346, 0, 0.1528, 0.5072, 0, 0, 0, 0],
        7: [0.0553, 0.1230, 0, 0.1122, 0.3724, 0, 0.1195, 0.2177, 0],
        8: [0.0553, 0.1230, 0, 0.1122, 0.3724, 0, 0.1195, 0.2177, 0],  # a landmark does not see itself
    }
    for query, row in wanted.items():
        assert [round(x, 4) for x in weights[query].tolist()] == row


def test_worked_example_through_the_blocked_form():
    """With unit vectors as keys and as values, the queries are the scores and the output is the weights."""
    weights = lcx.landmark_attention(*_as_attention(WORKED.expand(9, 9)), 3, scale=1.0)[0, 0]
    assert_close(weights, lcx.grouped_softmax(WORKED.expand(9, 9), 3), **EXACT)


@pytest.mark.parametrize(("T", "block_size"), SQUARES)
@pytest.mark.parametrize("Q", [None, 1, 3])
def test_equals_the_definition(T, block_size, Q):
    scores = numbers(3, 2, 3, Q or T, T)
    assert_close(lcx.grouped_softmax(scores, block_size), defined_weights(scores, block_size), **EXACT)


@pytest.mark.parametrize(("T", "block_size"), SQUARES)
def test_rows_sum_to_one_and_landmarks_and_the_future_get_nothing(T, block_size):
    weights = lcx.grouped_softmax(numbers(4, 2, T, T, spread=9.0), block_size)
    assert_close(weights.sum(-1), torch.ones(2, T, dtype=torch.float64), **EXACT)
    assert (weights >= 0).all()
    assert (weights[..., is_landmark(T, block_size)] == 0).all()
    assert (weights.triu(1) == 0).all()


def test_without_a_landmark_it_is_the_causal_softmax():
    scores = numbers(5, 2, 7, 7)
    causal = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1)
    assert_close(lcx.grouped_softmax(scores, 8), causal, **EXACT)


def test_one_block_is_the_causal_softmax_over_its_tokens():
    scores = numbers(6, 5, 5)
    hidden = torch.ones(5, 5).triu(1).bool() | is_landmark(5, 5)
    assert_close(
        lcx.grouped_softmax(scores, 5), scores.masked_fill(hidden, float("-inf")).softmax(-1), **EXACT
    )


def test_blocks_of_one_token_get_what_their_landmark_gets():
    """By hand, query 4 of blocks (0, 1), (2, 3), (4, 5): its own token and the landmarks 1 and 3 under one softmax."""
    scores = numbers(7, 6, 6)
    main = scores[4, [1, 3, 4]].softmax(0)
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[[0, 2, 4]] = main
    assert_close(lcx.grouped_softmax(scores, 2)[4], wanted, **EXACT)


@pytest.mark.parametrize(("T", "block_size"), SQUARES)
def test_equal_logits_are_shared_out_as_in_the_paper(T, block_size):
    """Appendix A: own tokens and earlier blocks get the same share; a block shares its own among its tokens."""
    weights, F = lcx.grouped_softmax(torch.full((T, T), 0.7, dtype=torch.float64), block_size), block_size - 1
    for i in range(T):
        b, r = divmod(i, block_size)
        members = min(r + 1, F) + b  # a landmark sees the F tokens of its block, not itself
        for j in range(i + 1):
            own = j // block_size == b
            share = 0 if j % block_size == F else 1 / members if own else 1 / (members * F)
            assert weights[i, j].item() == pytest.approx(share, abs=1e-12)


def test_the_papers_example_of_equal_logits():
    row = lcx.grouped_softmax(torch.zeros(9, 9, dtype=torch.float64), 3)[6]
    assert_close(row, torch.tensor([1, 1, 0, 1, 1, 0, 2, 0, 0], dtype=torch.float64) / 6, **EXACT)


def test_a_landmark_gates_its_block():
    scores, query = numbers(8, 12, 12), 9  # blocks of 4; query 9 is in the third
    weights = lcx.grouped_softmax(scores, 4)[query]
    closed = scores.clone()
    closed[query, 3] = float("-inf")
    without = lcx.grouped_softmax(closed, 4)[query]
    assert (without[:4] == 0).all()
    assert_close(without[4:], weights[4:] / weights[4:].sum(), **EXACT)
    # In an earlier block only differences count; so they do between the query's own tokens and all landmarks.
    for columns in ([0, 1, 2], [3, 7, 8, 9]):
        shifted = scores.clone()
        shifted[query, columns] += 3.0
        assert_close(lcx.grouped_softmax(shifted, 4)[query], weights, **EXACT)
    shifted[query, 8] += 1.0  # and not every change goes unseen
    assert (lcx.grouped_softmax(shifted, 4)[query] - weights).abs().max() > 1e-2


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float64).min], ids=["-inf", "min"])
def test_scores_hidden_by_the_caller_leave_no_nan(hidden):
    """A whole earlier block and a single key: what is left shares the weight. The mask is added, as transformers does."""
    scores = numbers(9, 14, 14).requires_grad_()
    bias = torch.zeros(14, 14, dtype=torch.float64)
    bias[:, 4:8] = hidden
    bias[:, 1] = hidden
    weights = lcx.grouped_softmax(scores + bias, 4)
    assert (weights[:, [1, 4, 5, 6, 7]][8:] == 0).all()
    assert_close(weights.sum(-1), torch.ones(14, dtype=torch.float64), **EXACT)
    (weights * numbers(12, 14, 14)).sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0
    masked = lcx.landmark_attention(*_as_attention(scores.detach()), 4, scale=1.0, mask=bias[:1] == 0)
    assert_close(masked[0, 0, 8:], weights[8:].detach(), **EXACT)


def test_a_query_that_may_see_nothing_gets_nothing():
    scores = torch.full((5, 5), float("-inf"), dtype=torch.float64).requires_grad_()
    weights = lcx.grouped_softmax(scores, 3)
    weights.sum().backward()
    assert (weights == 0).all() and (scores.grad == 0).all()


def _as_attention(scores):
    """Queries, keys and values whose products are these scores [T, T] and whose output is the weights."""
    return (x[None, None] for x in (scores, torch.eye(len(scores)).double(), torch.eye(len(scores)).double()))


def test_gradcheck_of_the_weights():
    for Q, K, block_size in [(7, 7, 3), (3, 8, 3), (5, 5, 8)]:
        scores = numbers(10, Q, K).requires_grad_()
        assert torch.autograd.gradcheck(lambda s, b=block_size: lcx.grouped_softmax(s, b), (scores,))


def test_weights_in_bfloat16():
    scores = numbers(11, 2, 30, 30, spread=20.0)
    weights = lcx.grouped_softmax(scores.bfloat16(), 8)
    assert weights.dtype == torch.bfloat16 and weights.isfinite().all()
    assert_close(weights.double(), lcx.grouped_softmax(scores.bfloat16().double(), 8), atol=0.01, rtol=0.02)


# The blocked form ---------------------------------------------------------------------------------------------------

# (B, H, Hkv, Q, K, D, block_size)
GRID = [
    (1, 2, 2, 16, 16, 4, 4),
    (2, 4, 2, 13, 13, 3, 4),
    (1, 3, 1, 9, 21, 3, 4),  # the history ends inside a block
    (1, 2, 2, 8, 20, 3, 4),  # the history is whole blocks
    (1, 2, 1, 1, 12, 3, 4),
    (1, 2, 1, 2, 12, 3, 4),
    (1, 1, 1, 15, 15, 5, 2),
    (1, 2, 1, 10, 10, 3, 16),
    (1, 2, 2, 19, 23, 3, 7),
]


def case(B, H, Hkv, Q, K, D, block_size, seed=20):
    shapes = (B, H, Q, D), (B, Hkv, K, D), (B, Hkv, K, D)
    return [numbers(seed + n, *shape).requires_grad_() for n, shape in enumerate(shapes)]


def hidden_keys(B, K, block_size) -> torch.Tensor:
    """Padding before the text, a hole, a hidden landmark, and, in the second row, a whole hidden block."""
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[0, : K // 5] = False
    mask[0, K // 2] = False
    if K > block_size:
        mask[0, block_size - 1] = False
    mask[1:, block_size // 2 : 2 * block_size] = False
    return mask


def packed(B, K, block_size) -> torch.Tensor:
    """Documents of one to three blocks, other ones in each row."""
    blocks = -(-K // block_size)
    return torch.stack([(torch.arange(blocks) + b) // (2 + b) for b in range(B)])


@pytest.mark.parametrize("tile", [1, 8, 128])
@pytest.mark.parametrize("options", ["", "mask", "documents", "mask documents"])
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_blocked_form_equals_the_definition(shape, options, tile, monkeypatch):
    """Output and all gradients, whatever the tiles are."""
    monkeypatch.setattr(landmark, "TILE", tile)
    B, K, block_size = shape[0], shape[4], shape[6]
    extra = {}
    if "mask" in options:
        extra["mask"] = hidden_keys(B, K, block_size)
    if "documents" in options:
        extra["documents"] = packed(B, K, block_size)
    tensors = case(*shape)
    got = results(lcx.landmark_attention, *tensors, block_size, **extra)
    for key, value in _wanted(shape, options, tensors, block_size, extra).items():
        assert_close(got[key], value, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


_DONE: dict = {}


def _wanted(shape, options, tensors, block_size, extra):
    if (shape, options) not in _DONE:  # the same for every size of the tiles
        _DONE[shape, options] = results(defined_attention, *tensors, block_size, **extra)
    return _DONE[shape, options]


@pytest.mark.parametrize("block_size", [2, 3, 5, 8, 13, 64])
def test_blocked_form_over_block_sizes(block_size, monkeypatch):
    monkeypatch.setattr(landmark, "TILE", 16)
    tensors = case(1, 2, 1, 70, 70, 4, block_size)
    q, k, v = tensors
    scores = (q @ k.mT) / 2
    got = results(lcx.landmark_attention, *tensors, block_size)
    wanted = results(lambda q, k, v, b: lcx.grouped_softmax(q @ k.mT / 2, b) @ v, *tensors, block_size)
    for key, value in wanted.items():
        assert_close(got[key], value, **EXACT)
    row = row_weights(scores[0, 1, 69].detach(), 69, block_size)
    assert_close(got["out"][0, 1, 69], row @ v[0, 0].detach(), **EXACT)


def test_gradcheck_of_the_blocked_form(monkeypatch):
    monkeypatch.setattr(landmark, "TILE", 4)
    for shape in [(1, 2, 1, 7, 7, 2, 3), (1, 2, 2, 3, 8, 2, 3)]:
        tensors, block_size = case(*shape), shape[6]
        assert torch.autograd.gradcheck(lambda *t, b=block_size: lcx.landmark_attention(*t, b), tensors)
    mask, documents = torch.ones(1, 8).bool(), torch.tensor([[0, 0, 1]])
    mask[0, [1, 2]] = False
    assert torch.autograd.gradcheck(
        lambda *t: lcx.landmark_attention(*t, 3, mask=mask, documents=documents), case(1, 2, 1, 8, 8, 2, 3)
    )


def test_a_later_token_changes_no_earlier_output():
    q, k, v = (t.detach() for t in case(1, 2, 2, 22, 22, 3, 4))
    before = lcx.landmark_attention(q, k, v, 4)
    for t in (0, 3, 4, 10, 11, 21):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1.0
        after = lcx.landmark_attention(*changed, 4)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert (after[:, :, t] - before[:, :, t]).abs().max() > 1e-3


def test_values_of_landmarks_are_never_read():
    q, k, v = case(2, 2, 1, 22, 22, 3, 4)
    got = results(lcx.landmark_attention, q, k, v, 4)
    landmarks = is_landmark(22, 4)
    assert (got["dv"][:, :, landmarks] == 0).all() and (got["dv"][:, :, ~landmarks] != 0).all()
    assert (got["dk"][:, :, landmarks] != 0).all(), "their keys are what is trained"
    other = v.detach().clone()
    other[:, :, landmarks] = 1e9
    assert torch.equal(lcx.landmark_attention(q, k, other, 4), got["out"])


def test_each_block_alone_is_plain_attention_over_the_block():
    """The query's own block and nothing fetched: a plain causal softmax without the landmark."""
    q, k, v = (t.detach() for t in case(1, 2, 2, 18, 18, 3, 6))
    out = lcx.landmark_attention(q, k, v, 6, documents=torch.arange(3)[None])
    hidden = torch.ones(6, 6).triu(1).bool() | is_landmark(6, 6)
    for part in range(3):
        qb, kb, vb = (x[:, :, 6 * part : 6 * part + 6] for x in (q, k, v))
        plain = (qb @ kb.mT / 3**0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ vb
        assert_close(out[:, :, 6 * part : 6 * part + 6], plain, **EXACT)


def test_packed_documents_are_as_they_are_alone():
    tensors = case(1, 2, 1, 22, 22, 3, 4)
    packed_results = results(
        lcx.landmark_attention, *tensors, 4, documents=torch.tensor([[7, 7, 3, 3, 3, 8]])
    )
    for part in (slice(0, 8), slice(8, 20), slice(20, 22)):
        alone = [x.detach()[:, :, part].requires_grad_() for x in tensors]
        out = lcx.landmark_attention(*alone, 4)
        assert_close(packed_results["out"][:, :, part], out.detach(), **EXACT)
        grads = torch.autograd.grad((out * numbers(99, 1, 2, 22, 3)[:, :, part]).sum(), alone)
        for key, g in zip(("dq", "dk", "dv"), grads, strict=True):
            assert_close(packed_results[key][:, :, part], g, **EXACT)


def test_padding_after_the_text_changes_nothing():
    q, k, v = (t.detach() for t in case(1, 2, 1, 14, 14, 3, 4))
    mask = torch.arange(14)[None] < 10
    padded = lcx.landmark_attention(q, k, v, 4, mask=mask)
    alone = lcx.landmark_attention(*(x[:, :, :10] for x in (q, k, v)), 4)
    assert_close(padded[:, :, :10], alone, **EXACT)
    whole = lcx.landmark_attention(q, k, v, 4, mask=torch.ones(1, 14).bool())
    assert_close(whole, lcx.landmark_attention(q, k, v, 4), **EXACT)


def test_lse_joins_more_keys_under_the_same_softmax():
    """It is the logarithm of the main softmax's denominator."""
    q, k, v = (t.detach() for t in case(1, 2, 2, 13, 13, 3, 4))
    out, lse = lcx.landmark_attention(q, k, v, 4, return_lse=True)
    scores = q @ k.mT / 3**0.5
    for i in range(13):
        b = i // 4
        main = [j for j in range(i + 1) if (j // 4 == b) != (j % 4 == 3)]
        assert_close(lse[..., i], scores[..., i, main].logsumexp(-1), **EXACT)
    assert torch.equal(out, lcx.landmark_attention(q, k, v, 4))
    nothing = torch.zeros(1, 13).bool()
    out, lse = lcx.landmark_attention(q, k, v, 4, mask=nothing, return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_scale():
    q, k, v = (t.detach() for t in case(1, 1, 1, 10, 10, 4, 4))
    assert_close(lcx.landmark_attention(q, k, v, 4, scale=1.0), lcx.landmark_attention(2 * q, k, v, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_nan_where_nothing_can_be_seen(dtype):
    """A row without keys, hidden blocks, and scores far outside of what exp can take."""
    q, k, v = (t.detach().to(dtype) for t in case(3, 2, 1, 14, 14, 4, 4))
    q = (30 * q).requires_grad_()
    k, v = (30 * k).requires_grad_(), v.requires_grad_()
    mask = hidden_keys(3, 14, 4)
    mask[2] = False
    out = lcx.landmark_attention(q, k, v, 4, mask=mask)
    grads = torch.autograd.grad(out.float().pow(2).sum(), (q, k, v))
    for x in (out, *grads):
        assert x.dtype == dtype and x.isfinite().all()
    assert (out[2] == 0).all() and all((g[2] == 0).all() for g in grads)
    wanted = defined_attention(*(x.detach().double() for x in (q, k, v)), 4, mask=mask)
    assert_close(out.detach().double(), wanted, atol={torch.float32: 1e-4}.get(dtype, 0.02), rtol=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str)
def test_statistics_are_float32(dtype, tolerance):
    """2,048 keys of nearly equal weight: a sum kept in bfloat16 would stop growing at 256."""
    q, k = numbers(30, 1, 1, 4, 8, spread=0.1).to(dtype), numbers(31, 1, 1, 2048, 8, spread=0.1).to(dtype)
    v = 1 + numbers(32, 1, 1, 2048, 8, spread=0.5).to(dtype)
    out = lcx.landmark_attention(q, k, v, 16)
    assert out.dtype == dtype
    exact = lcx.grouped_softmax(q.double() @ k.double().mT / 8**0.5, 16) @ v.double()
    assert_close(out.double(), exact, atol=tolerance, rtol=0)


def test_autocast_changes_nothing_of_float32_inputs():
    q, k, v = (t.detach().float() for t in case(1, 2, 2, 30, 30, 4, 4))
    plain = results(lcx.landmark_attention, *(x.requires_grad_() for x in (q, k, v)), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(lcx.landmark_attention, q, k, v, 4)
    for key, value in plain.items():
        assert inside[key].dtype == torch.float32 and torch.equal(inside[key], value)


def test_views_in_any_order_are_fine():
    """transformers hands over transposed views."""
    q, k, v = (t.detach() for t in case(2, 4, 2, 13, 13, 3, 4))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    plain = results(lcx.landmark_attention, *(x.requires_grad_() for x in (q, k, v)), 4)
    for key, value in results(lcx.landmark_attention, *views, 4).items():
        assert_close(value, plain[key], **EXACT)


# Memory -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def largest(T, attention, block_size=16):
    q, k, v = (torch.zeros(1, 1, T, 4, requires_grad=True) for _ in range(3))
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
        Largest() as mode,
    ):
        attention(q, k, v, block_size).sum().backward()
    return mode.elements, sum(kept)


def test_memory_grows_linearly():
    def eager(q, k, v, block_size):
        return lcx.grouped_softmax(q @ k.mT, block_size) @ v

    assert largest(512, eager)[0] >= 512**2, "the definition holds all scores, so the measure sees it"
    at = {T: largest(T, lcx.landmark_attention) for T in (1024, 2048, 4096)}
    for T, (elements, kept) in at.items():
        assert elements <= landmark.TILE * T, "one tile of queries with all keys"
        assert kept <= 20 * T, "q, k, v, the output, and nothing of the scores"
    assert at[4096][0] <= 2.1 * at[2048][0] <= 4.5 * at[1024][0]


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 0, -3])
def test_a_block_needs_a_token_beside_its_landmark(block_size):
    q = torch.zeros(1, 1, 4, 2)
    for call in (
        lambda: lcx.grouped_softmax(torch.zeros(4, 4), block_size),
        lambda: lcx.landmark_attention(q, q, q, block_size),
    ):
        with pytest.raises(LcxError, match="block_size") as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "word"),
    [
        ((1, 2, 5, 4), (1, 2, 4, 4), (1, 2, 4, 4), {}, "fit"),  # more queries than keys
        ((1, 3, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), {}, "multiple"),
        ((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 5, 4), {}, "fit"),
        ((1, 2, 4, 4), (1, 2, 4, 3), (1, 2, 4, 3), {}, "fit"),
        ((2, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), {}, "fit"),
        ((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), {"mask": torch.ones(1, 3).bool()}, "mask"),
        ((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), {"mask": torch.ones(1, 4)}, "mask"),
        ((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), {"documents": torch.zeros(1, 4).long()}, "documents"),
    ],
)
def test_shapes_that_do_not_fit_give_one_line(q, k, v, options, word):
    with pytest.raises(LcxError, match=word) as e:
        lcx.landmark_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), 3, **options)
    assert "\n" not in str(e.value)


def test_more_queries_than_keys():
    with pytest.raises(LcxError, match="5 queries for 4 keys"):
        lcx.grouped_softmax(torch.zeros(5, 4), 2)


if __name__ == "__main__":
    STORED.write_text(json.dumps(compute(), separators=(",", ":")) + "\n")
