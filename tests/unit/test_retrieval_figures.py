"""The figures of chapter 8 show which blocks were opened in a real run, and draw the numbers they were given."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lcx
from lcx.figures import retrieval as figures
from lcx.tasks.needle_copy import needle_copy


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=82, max_position_embeddings=32, **sizes)).eval()


def test_spans_are_the_blocks_that_hold_the_needle():
    ids, _ = needle_copy(1, 120, 8, generator=torch.Generator().manual_seed(3), needles=3, cue=2)
    text, size = ids[0, :-8], 4
    needles = text[text >= 17].view(3, 8)
    with_landmarks = lcx.insert_landmarks(text, size, 81)
    for (first, last), needle in zip(figures.spans(text, needles, size).tolist(), needles, strict=True):
        inside = with_landmarks[first * size : (last + 1) * size]
        assert set(needle.tolist()) <= set(inside.tolist())
        for end in (slice((first + 1) * size, (last + 1) * size), slice(first * size, last * size)):
            assert not set(needle.tolist()) <= set(with_landmarks[end].tolist()), "fewer blocks hold it too"


def test_hits_are_per_head_and_token():
    blocks = torch.tensor([[[-1, 3], [4, 7]], [[5, 6], [2, 8]]])
    assert figures.hits(blocks, torch.tensor([3, 5])).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    "n, k, chosen, want",
    [  # the table of the specification
        (5, 2, [0, 1], [0, 1]),
        (5, 2, [1, 3], [0, 2]),
        (5, 2, [3, 4], [1, 2]),
        (10, 4, [0, 5, 8, 9], [0, 1, 3, 4]),
        (10, 4, [6, 7, 8, 9], [1, 2, 3, 4]),
        (3, 4, [0, 1, 2], [1, 2, 3]),
    ],
)
def test_slots_of_chosen_blocks(n, k, chosen, want):
    assert figures.chosen_slots(n, k, chosen) == want


def test_every_rule_chooses_k_different_blocks_in_order():
    for n in range(1, 13):
        for k in range(1, min(4, n) + 1):
            for name, rule in figures.RULES.items():
                picked = rule(n, k)
                assert len(picked) == k and picked == sorted(set(picked)), (name, n, k)
                assert 0 <= picked[0] and picked[-1] < n


def test_slots_figure_moves_nothing_beyond_slot_0():
    fig = figures.slots(range(1, 13), range(1, 5))
    for frame in fig.frames:
        rest, chosen, _, empty = frame.data
        k = len(chosen.x) // 2
        assert len(rest.x) + k <= 12 and len(empty.x) == 1
        assert min(chosen.x[k:]) >= -(k + 1) and set(chosen.x[k:]) | set(empty.x) == set(range(-k - 1, 0))
    twelve = next(f for f in fig.frames if f.name == "11.3.1")  # 12 blocks, top_k 4, the newest
    assert twelve.data[1].x == (-4, -3, -2, -1) * 2 and "1, 2, 3, 4" in twelve.layout.xaxis.title.text


def test_theatre_shows_what_was_recorded(model):
    ids, _ = needle_copy(1, 90, 8, generator=torch.Generator().manual_seed(1), needles=2, cue=2)
    document = ids[:, :-8]
    needles = document[document >= 17].view(2, 8)
    span = figures.spans(document[0], needles, 4)
    asked = []
    with lcx.LandmarkAttention(4, 2, landmark_id=81)(model) as landmark, torch.no_grad():
        state = landmark.remember(document)
        for i, needle in enumerate(needles):
            with landmark.recording() as trace:
                logits = model(needle[None], past_key_values=state.fork()).logits[0]
            asked.append(figures.Asked.of(_Words, needle, logits, trace, span[i]))
    fig = figures.theatre(asked, state.blocks)
    assert len(fig.frames) == 2 * 8 * 2
    for at, frame in enumerate(fig.frames):
        needle, token, layer = at // 16, at % 16 // 2, at % 2
        _, other, good = frame.data
        opened = trace_blocks = asked[needle].opened[layer][:, token]
        assert opened.shape == (2, 2)
        shown = sorted([*zip(other.y, other.x, strict=True), *zip(good.y, good.x, strict=True)])
        assert shown == sorted((h, b) for h in range(2) for b in trace_blocks[h].tolist())
        first, last = span[needle].tolist()
        assert all(first <= b <= last for b in good.x) and not any(first <= b <= last for b in other.x)
        assert asked[needle].words[token] in frame.layout.xaxis.title.text


class _Words:
    convert_ids_to_tokens = staticmethod(lambda ids: [f"t{i}" for i in ids])


def test_hit_rates_and_fetched_draw_what_they_get():
    fig = figures.hit_rates(torch.tensor([[0.0, 0.1], [1.0, 0.5]]), 0.0625)
    assert list(fig.data[0].y) == [0, 100] and list(fig.data[1].y) == [10, 50]
    assert fig.layout.annotations[0].text.strip() == "at random: 6.2 %"
    fig = figures.fetched({"head": [4, 5.25], "token": [8, 7]}, 44)
    assert list(fig.data[0].y) == [4, 5.2] and fig.layout.shapes[0].y0 == 44


def test_price_divides_bytes_by_the_tokens_read():
    rows = [
        {"top_k": k, "tokens": n, "whole": 0.5, "whole_low": 0.4, "whole_high": 0.7, "bytes_read": {"blocks": k * n * 8 * 2048}}
        for k in (1, 4) for n in (256, 1024)
    ]  # fmt: skip
    fig = figures.price(rows, {256: 8, 1024: 4}, start=1024)
    for frame, texts in zip(fig.frames, (8, 4), strict=True):
        assert [p.x[0] for p in frame.data] == [16 / texts, 64 / texts]
        assert frame.data[0].y == (50,) and frame.data[0].error_y.array == (20,)
        assert frame.data[0].error_y.arrayminus == (10,)


def test_decode_and_by_tokens():
    rows = [
        {"tokens": n, "dense_ms": n / 1e3, "landmark_ms": 0.5, "scoring_ms": 0.1, "dense_bytes": n * 2**20, "bytes": 2**21}
        for n in (8192, 131072)
    ]  # fmt: skip
    fig = figures.decode(rows)
    drawn = {(t.name, t.yaxis): list(t.y) for t in fig.data}
    assert drawn["dense", "y2"] == [8192, 131072] and drawn["landmark", "y2"] == [2, 2]
    assert drawn["landmark", "y"] == [0.5, 0.5] and ("scoring landmarks alone", "y2") not in drawn
    rows = [
        {"tokens": n, "seed": s, "mode": m, "accuracy": s / 10} for n in (9, 3) for s in (1, 2) for m in "ab"
    ]
    assert figures.by_tokens(rows, mode="a") == {3: [0.1, 0.2], 9: [0.1, 0.2]}
    assert figures.by_tokens(rows, mode="a", seed=2) == {3: [0.2], 9: [0.2]}
