"""Choosing blocks, the places they get, and attention to them, against the specification written out query by query."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

import lcx
from lcx.methods.retrieval import attend_blocks, choose_blocks, distances, score_blocks
from lcx.methods.rope import rope
from lcx.softmax import merge
from tests.contracts.reference import landmark_place, landmark_weights

EXACT = {"atol": 1e-10, "rtol": 1e-10}
B, D, THETA = 4, 6, 100.0  # block size, head size, RoPE's base


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def newest(n, k):
    """The k newest of n blocks, as the cache tells them: int64 [1, min(k, n)]."""
    return torch.arange(max(0, n - k), n)[None]


def at(x, positions):
    """x [..., T, D] rotated to positions [T]."""
    frequencies = THETA ** (-torch.arange(D // 2).double() / (D // 2))
    return rope(x, torch.as_tensor(positions), frequencies=frequencies)


class Text:
    """q, k, v [1, H, T, D] before rotation; the last queries [chunk] stand after n whole blocks and `tail` tokens."""

    def __init__(self, n, tail=0, chunk=B, heads=2, kv_heads=1, seed=0):
        self.n, self.tail, self.start = n, tail, n * B + tail
        T = self.start + chunk
        self.q, self.k, self.v = (
            numbers(seed, 1, heads, T, D),
            numbers(seed + 1, 1, kv_heads, T, D),
            numbers(seed + 2, 1, kv_heads, T, D),
        )
        self.new = self.q[:, :, self.start :]
        self.here = torch.arange(tail, tail + chunk)  # place of the queries in the local context
        stored = at(self.k[:, :, : n * B], torch.arange(n * B) % B)  # by the offset in the block
        self.stored = stored.unflatten(2, (-1, B)), self.v[:, :, : n * B].unflatten(2, (-1, B))
        self.landmarks = self.stored[0][:, :, :, -1]

    def turned(self, k, base=0):
        return torch.stack([at(self.new, self.here + d * B + base) for d in range(1, k + 2)], 3)

    def scores(self, k, base=0):
        recent = newest(self.n, k)
        turned = self.turned(recent.shape[1], base)
        return score_blocks(turned, self.landmarks, recent, self.new.shape[-1] ** -0.5)

    def fetch(self, blocks):
        """[1, H, T, k, B, D], every query head from its key head."""
        groups = self.q.shape[1] // self.k.shape[1]
        head = (torch.arange(self.q.shape[1]) // groups).view(1, -1, 1, 1)
        return tuple(x[0][head, blocks.clamp(min=0)] for x in self.stored)

    def local(self):
        x = [t[:, :, self.n * B :] for t in (self.k, self.v)]
        k = at(x[0], torch.arange(x[0].shape[2]))
        return lcx.landmark_attention(at(self.new, self.here), k, x[1], B, return_lse=True)

    def attend(self, blocks, recent):
        blocks = blocks.expand(-1, self.q.shape[1], self.new.shape[2], -1)
        return attend_blocks(self.turned(blocks.shape[-1]), *self.fetch(blocks), blocks, recent, D**-0.5)


# Places -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "chosen", "slots"),
    [
        (5, 2, [0, 1], [0, 1]),
        (5, 2, [1, 3], [0, 2]),
        (5, 2, [2, 4], [0, 2]),
        (5, 2, [3, 4], [1, 2]),
        (10, 4, [0, 5, 8, 9], [0, 1, 3, 4]),
        (10, 4, [2, 3, 6, 9], [0, 1, 3, 4]),
        (10, 4, [6, 7, 8, 9], [1, 2, 3, 4]),
        (3, 4, [0, 1, 2], [1, 2, 3]),
    ],
)
def test_places_are_those_of_the_specification(n, k, chosen, slots):
    """Slot s of k + 1 is k + 1 - s blocks before the local context."""
    blocks = torch.tensor(chosen).view(1, 1, 1, -1)
    assert (len(chosen) + 1 - distances(blocks, newest(n, k))).flatten().tolist() == slots


def test_one_place_stays_empty_and_the_order_is_kept():
    for n, k in [(6, 1), (6, 2), (7, 3), (4, 4)]:
        for chosen in combinations(range(n), k):
            back = distances(torch.tensor(chosen).view(1, 1, 1, -1), newest(n, k)).flatten().tolist()
            assert back == sorted(set(back), reverse=True) and set(back) < set(range(1, k + 2))
            true = [n - b for b in chosen]
            assert all(d <= t or t > k for d, t in zip(back, true, strict=True)), "never farther than it is"
            if chosen == tuple(range(n - k, n)):
                assert back == true


def test_rows_with_fewer_blocks_place_what_they_have():
    blocks, recent = torch.tensor([[-1, 2, 4]]).view(1, 1, 1, 3), torch.tensor([[-1, 2, 4]])
    assert distances(blocks, recent).flatten().tolist()[1:] == [2, 1]


# Choice -------------------------------------------------------------------------------------------------------------


def brute_force(row, k):
    best = max(combinations(range(len(row)), k), key=lambda c: sum(row[i] for i in c))
    return list(best)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 9])
def test_the_best_are_chosen(k):
    scores, n = numbers(0, 2, 3, 5, 7), 7
    blocks = choose_blocks(scores, torch.ones(2, n).bool(), k)
    assert blocks.shape == (2, 3, 5, min(k, n))
    for b in range(2):
        for h in range(3):
            for t in range(5):
                assert blocks[b, h, t].tolist() == brute_force(scores[b, h, t].tolist(), min(k, n))


@pytest.mark.parametrize(("granularity", "dim"), [("head", 2), ("token", 1)])
def test_shared_choices_compare_probabilities(granularity, dim):
    scores = numbers(1, 2, 3, 5, 7)
    scores[:, 0] *= 5  # a head with large scores must not win by their size alone
    scores[:, :, 1] += 20  # nor a query
    blocks = choose_blocks(scores, torch.ones(2, 7).bool(), 2, granularity)
    best = scores.softmax(-1).amax(dim, keepdim=True)
    assert blocks.shape == (2, *best.shape[1:3], 2)
    for chosen, row in zip(blocks.flatten(0, 2).tolist(), best.flatten(0, 2).tolist(), strict=True):
        assert chosen == brute_force(row, 2)


def test_of_equals_the_newest_win():
    scores = torch.tensor(
        [[1.0, 1, 1, 1, 1], [0, 3, 0, 3, 3], [5, 1, 1, 1, 0], [2, 2, 1, 1, 1], [0, 0, 0, 0, 9]]
    )
    blocks = choose_blocks(scores.view(1, 1, 5, 5), torch.ones(1, 5).bool(), 2)
    assert blocks[0, 0].tolist() == [[3, 4], [3, 4], [0, 3], [0, 1], [3, 4]]


def test_rounding_does_not_decide():
    exact = torch.tensor([40.0, 40.0, 40.0, 12.0, 40.0, -3.0]).expand(1, 1, 200, 6)
    noise = (
        5e-7 * numbers(2, 1, 1, 200, 6).float() * exact.abs()
    )  # keys made in chunks of other lengths differ so
    for granularity in ("head_and_token", "head", "token"):
        blocks = choose_blocks(exact + noise, torch.ones(1, 6).bool(), 2, granularity)
        assert (blocks == torch.tensor([2, 4])).all()


def test_every_row_chooses_among_its_own_blocks():
    scores = numbers(3, 3, 2, 4, 6)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]]).bool()
    blocks = choose_blocks(scores, valid, 3)
    for b in range(3):
        own = valid[b].nonzero().flatten().tolist()
        alone = choose_blocks(scores[b : b + 1, ..., own], torch.ones(1, len(own)).bool(), 3)
        named = torch.tensor(own)[alone[0]]
        padded = torch.full((2, 4, 3), -1)
        padded[..., 3 - named.shape[-1] :] = named
        assert torch.equal(blocks[b], padded)
    none = choose_blocks(scores, torch.zeros(3, 6).bool(), 2)
    assert (none == -1).all()


# Scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize(("n", "k"), [(5, 2), (7, 1), (3, 3), (2, 4)])
def test_scores_are_products_with_keys_at_their_slots(n, k, tail):
    text = Text(n, tail)
    k = min(k, n)
    for t in range(B):
        here = (k + 1) * B + tail + t
        q = at(text.new[0, :, t : t + 1], [here])
        for b in range(n):
            slot = 0 if b < n - k else b - (n - k) + 1
            key = at(text.k[0, :, landmark_place(b * B, B)][:, None], [slot * B + B - 1])
            assert_close(text.scores(k)[0, :, t, b], (q * key).sum(-1)[:, 0] / math.sqrt(D), **EXACT)


def test_where_the_slots_start_does_not_matter():
    text, base = Text(6, tail=1), 1000
    before = text.scores(2)
    text.landmarks = at(text.landmarks, [base] * 6)
    assert_close(text.scores(2, base), before, atol=1e-8, rtol=1e-8)
    assert (text.scores(2) - before).abs().max() > 1e-2


def test_old_blocks_share_a_place():
    """Put in another order, they keep their scores; the others' scores do not change at all."""
    text, n, k = Text(7), 7, 2
    before = text.scores(k)
    order = torch.tensor([3, 0, 4, 1, 2, 5, 6])
    text.landmarks = text.landmarks[:, :, order]
    assert_close(text.scores(k), before[..., order], **EXACT)
    recent = torch.tensor([0, 1, 2, 3, 4, 6, 5])  # the newest do not share theirs
    text.landmarks = text.landmarks[:, :, recent]
    assert (text.scores(k)[..., 5] - before[..., 6]).abs().max() > 1e-2
    assert n == text.n


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("tail", "chunk"), [(0, B), (0, 2 * B), (2, 2), (3, 1), (1, 1)])
def test_fetched_and_local_blocks_under_one_grouped_softmax(tail, chunk, kv_heads):
    """Every query with the blocks it chose itself, against equations 1 to 4 with keys rotated to their slots."""
    n, k, groups = 6, 2, 2 // kv_heads
    text = Text(n, tail, chunk, kv_heads=kv_heads, seed=5)
    blocks = choose_blocks(text.scores(k), torch.ones(1, n).bool(), k)
    out, lse = merge([text.local(), text.attend(blocks, newest(n, k))])
    assert lse.isfinite().all()
    for h in range(2):
        for t in range(chunk):
            places, positions = [], []
            for rank, b in enumerate(blocks[0, h, t].tolist()):
                slot = rank if b < n - k else rank + 1
                places += range(b * B, b * B + B)
                positions += range(slot * B, slot * B + B)
            places += range(n * B, text.start + t + 1)
            positions += range((k + 1) * B, (k + 1) * B + tail + t + 1)
            keys = at(text.k[0, h // groups, places], positions)
            q = at(text.new[0, h, t : t + 1], positions[-1:])[0]
            weights = landmark_weights(
                keys @ q / math.sqrt(D),
                places,
                [landmark_place(j, B) for j in places],
                landmark_place(places[-1], B),
            )
            assert_close(out[0, h, t], weights @ text.v[0, h // groups, places], **EXACT)


@pytest.mark.parametrize("shared", [False, True], ids=["each query its own", "shared"])
@pytest.mark.parametrize(("tail", "chunk"), [(0, B), (0, 2 * B), (2, 2), (3, 1)])
def test_the_newest_blocks_are_dense_attention_over_the_suffix(tail, chunk, shared):
    n, k = 6, 2
    text = Text(n, tail, chunk, seed=6)
    recent = newest(n, k)
    blocks = recent[:, None, None]
    if shared:
        fetched = text.fetch(blocks.expand(1, 2, 1, k))
        part = attend_blocks(text.turned(k), *fetched, blocks.expand(1, 2, 1, k), recent, D**-0.5)
    else:
        part = text.attend(blocks, recent)
    out = merge([text.local(), part])[0]
    suffix = slice((n - k) * B, None)
    places = torch.arange((n - k) * B, text.start + chunk)
    q, keys = (at(x[:, :, suffix], places) for x in (text.q, text.k))
    dense = lcx.landmark_attention(q[:, :, -chunk:], keys, text.v[:, :, suffix], B)
    assert_close(out, dense, **EXACT)


def test_values_of_fetched_landmarks_are_never_read():
    text = Text(5)
    recent = newest(5, 2)
    blocks = choose_blocks(text.scores(2), torch.ones(1, 5).bool(), 2)
    before = text.attend(blocks, recent)[0]
    text.stored[1][..., -1, :] = 1e9
    assert torch.equal(text.attend(blocks, recent)[0], before)


def test_a_row_without_blocks_gets_nothing():
    text = Text(3)
    blocks = torch.full((1, 2, B, 2), -1)
    out, lse = text.attend(blocks, torch.full((1, 2), -1))
    assert (out == 0).all() and (lse == float("-inf")).all()
