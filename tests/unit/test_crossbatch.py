"""Crossbatch against a definition written token by token, and the properties its specification promises."""

import math

import pytest
import torch
from torch.testing import assert_close

import lcx
from lcx.errors import LcxError
from lcx.methods import focused

B, H, HKV, S, D = 6, 4, 2, 5, 6


def tensors(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, S, D, generator=g, dtype=dtype)
    k, v, raw = (torch.randn(B, HKV, S, D, generator=g, dtype=dtype) for _ in range(3))
    return q, k, v, raw


def definition(q, k, v, contexts, raw, real, scale):
    """Token by token: which keys are seen, one softmax, one weighted sum."""
    out, mass = torch.zeros_like(q), q.new_zeros(B, H, S, 1 + contexts.shape[1])
    for b in range(B):
        for h in range(H):
            kv = h // (H // HKV)
            for t in range(S):
                seen = [(k[b, kv, u], v[b, kv, u], 0) for u in range(t + 1) if real[b, u]]
                for c, other in enumerate(contexts[b].tolist()):
                    if other >= 0:
                        seen += [
                            (raw[other, kv, u], v[other, kv, u], 1 + c) for u in range(S) if real[other, u]
                        ]
                e = [math.exp(float(q[b, h, t] @ key) * scale) for key, _, _ in seen]
                for weight, (_, value, place) in zip(e, seen, strict=True):
                    out[b, h, t] += weight / sum(e) * value
                    mass[b, h, t, place] += weight / sum(e)
    return out, mass


CONTEXTS = {
    "none": torch.full((B, 0), -1),
    "3B mixture": lcx.crossbatch_contexts([(0, 0), (1, 1), (2, 1)], B),
    "lanes": lcx.lane_contexts(3, 3),
    "holes": torch.tensor([[-1, 3], [5, -1], [-1, -1], [0, 1], [2, 2], [4, -1]]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("block", [1, 12, 4096])
def test_equals_the_definition(name, block):
    q, k, v, raw = tensors()
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, 3:], real[4, :2] = False, False
    wanted, shares = definition(q, k, v, CONTEXTS[name], raw, real, D**-0.5)
    got, mass = lcx.crossbatch_attention(q, k, v, CONTEXTS[name], k_memory=raw, mask=real, return_mass=True)
    seen = real.clone()  # a padded query sees what it sees; only those that see nothing have no definition
    seen[4, :2] = CONTEXTS[name][4].numel() > 0 and bool((CONTEXTS[name][4] >= 0).any())
    keep = seen[:, None, :, None].expand_as(wanted)
    assert_close(got[keep], wanted[keep], atol=1e-12, rtol=1e-10)
    if block:
        blocks = lcx.crossbatch_attention(q, k, v, CONTEXTS[name], k_memory=raw, mask=real, block=block)
        assert_close(blocks, got, atol=1e-12, rtol=1e-10)
    rows = seen[:, None, :, None].expand_as(mass)
    assert_close(mass[rows], shares[rows], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", CONTEXTS)
def test_fused_kernel_gives_the_same_output_and_gradients(name):
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in tensors(3)]
        q, k, v, raw = leaves
        out = lcx.crossbatch_attention(q, k, v, CONTEXTS[name], k_memory=raw)
        out.pow(2).sum().backward()
        results.append([out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)])
    for exact, fast in zip(*results, strict=True):
        assert_close(fast.double(), exact, atol=2e-5, rtol=1e-5)


def test_gradients_reach_negatives_and_equal_finite_differences():
    q, k, v, raw = (t.requires_grad_() for t in tensors(1))
    contexts = lcx.lane_contexts(3, 2)  # entry 3 sees entries 0 (own) and 1 (another document)

    def last_entries(*tensors):
        q, k, v, raw = tensors
        return lcx.crossbatch_attention(q, k, v, contexts, k_memory=raw, block=S)[3:]

    assert torch.autograd.gradcheck(last_entries, (q, k, v, raw), atol=1e-6)
    last_entries(q, k, v, raw)[0].sum().backward()
    for t in (v, raw):
        assert t.grad[0].abs().max() > 1e-6 and t.grad[1].abs().max() > 1e-6
        assert t.grad[2].abs().max() == 0  # nobody in entry 3 sees it


def test_scores_of_all_contexts_never_live_at_once(monkeypatch):
    widest = []
    attend = focused.attend

    def watch(q, k, *rest):
        widest.append(k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(focused, "attend", watch)
    q, k, v, _ = (t.requires_grad_() for t in tensors(2))
    lcx.crossbatch_attention(q, k, v, lcx.lane_contexts(3, 3), block=S).sum().backward()
    assert max(widest) == S and len(widest) == 1 + 3 + 3, (
        "window, 3 contexts, and those 3 again in the backward pass"
    )


@pytest.mark.parametrize(
    ("chunks", "reach", "stepping", "wanted"),
    [
        (4, 3, True, [(0, 0), (1, 1), (2, 1), (3, 0)]),  # LongLLaMA-3B
        (4, 6, True, [(0, 0), (1, 2), (2, 4), (3, 3)]),
        (4, 7, True, [(0, 0), (1, 2), (2, 4), (3, 4)]),
        (4, 3, False, [(0, 3), (1, 2), (2, 1), (3, 0)]),
        (2, 2, True, [(0, 0), (1, 1)]),
        (1, 7, True, [(0, 7)]),
    ],
)
def test_schedule_of_the_released_code(chunks, reach, stepping, wanted):
    assert lcx.crossbatch_schedule(chunks, reach, stepping) == wanted


def test_contexts_of_the_7b_mixture():
    table = [(0, 0), (1, 2), (2, 5), (3, 4)]
    for entry, row in enumerate(lcx.crossbatch_contexts(table, 16).tolist()):
        seen, doc, chunk = [c for c in row if c >= 0], entry // 4, entry % 4
        own = [c for c in seen if c // 4 == doc]
        assert own == [entry - 1 - i for i in range(table[chunk][0])], "own chunks: the ones before, in order"
        first = entry - chunk
        assert seen[len(own) :] == [first - 1 - i for i in range(min(table[chunk][1], first))]
        assert max(seen, default=-1) < entry, (
            "nobody sees later entries, so nothing can leak through a second layer"
        )


def test_the_start_of_a_batch_has_fewer_negatives():
    assert lcx.crossbatch_contexts([(0, 0), (1, 9)], 2).tolist() == [[-1], [0]]
    assert lcx.crossbatch_contexts([(0, 0), (1, 9)], 4).tolist() == [
        [-1] * 3,
        [0, -1, -1],
        [-1] * 3,
        [2, 1, 0],
    ]


def test_a_schedule_that_sees_nothing():
    assert lcx.crossbatch_contexts([(0, 0), (0, 0)], 4).shape == (4, 0)


@pytest.mark.parametrize("mask", [None, torch.ones(B, S, dtype=torch.bool)], ids=["fused", "in blocks"])
def test_under_autocast_the_softmax_stays_in_float32(mask):
    tensors32 = [t.float() for t in tensors(4)]
    q, k, v, raw = tensors32
    exact = lcx.crossbatch_attention(q, k, v, CONTEXTS["lanes"], k_memory=raw, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lcx.crossbatch_attention(q, k, v, CONTEXTS["lanes"], k_memory=raw, mask=mask)
    assert_close(got.float(), exact, atol=0.05, rtol=0.05)


def test_lanes_are_the_papers():
    assert lcx.lane_contexts(3, 2).tolist() == [[-1, -1]] * 3 + [[0, 1], [1, 2], [2, 0]]


def test_attention_spread_evenly_gives_one_over_d():
    q, k, v, _ = tensors()
    mass = lcx.crossbatch_attention(q * 0, k, v, lcx.lane_contexts(3, 3), return_mass=True)[1]
    assert_close(lcx.positive_share(mass)[3:], torch.full((3, H, S), 1 / 3))
    assert_close(mass.sum(-1), torch.ones(B, H, S, dtype=torch.float64))
    alone = lcx.crossbatch_attention(q, k, v, lcx.lane_contexts(3, 1), return_mass=True)[1]
    assert_close(lcx.positive_share(alone)[3:], torch.ones(3, H, S))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lcx.crossbatch_schedule(0, 3),
        lambda: lcx.crossbatch_schedule(2, -1),
        lambda: lcx.crossbatch_contexts([(0, 0), (1, 1)], 3),
        lambda: lcx.crossbatch_contexts([(0, 0), (2, 0)], 4),
        lambda: lcx.lane_contexts(3, 4),
        lambda: lcx.crossbatch_attention(*tensors()[:3], torch.full((B, 1), B)),
        lambda: lcx.crossbatch_attention(*tensors()[:3], torch.zeros(B - 1, 1, dtype=torch.int64)),
    ],
)
def test_bad_input_gives_one_line(call):
    with pytest.raises(LcxError) as e:
        call()
    assert "\n" not in str(e.value) and ":" in str(e.value)
