"""Scoring against greedy decoding, the Wilson interval against its definition, and a grid that can be interrupted."""

import json
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcx.errors import LcxError
from lcx.evaluate import exact_match, grid, table, wilson_interval
from lcx.tasks import Sample


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5,
            eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def make_sample(prompt, answer, **more):
    return Sample((*prompt, *answer), len(answer), str(answer), 0.5, (0, 0), 0, "made", **more)


def test_teacher_forced_exact_match_is_greedy_decoding(model):
    """The chapter's claim: one forward says what `generate` would have said, for right answers and for wrong ones."""
    rng = random.Random(0)
    samples, expected = [], []
    for i in range(40):
        prompt = [rng.randrange(3, 97) for _ in range(rng.choice([20, 33]))]
        ids = torch.tensor([prompt])
        count = rng.choice([1, 3, 5])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()  # fmt: skip
        answer = list(out)
        if i % 2:
            at = rng.randrange(count)
            answer[at] = (answer[at] + 1 + rng.randrange(90)) % 97
        samples.append(make_sample(prompt, answer))
        expected.append(answer == out)
    assert {True, False} == set(expected)
    assert [o.hit for o in exact_match(model, samples)] == expected
    assert [o.hit for o in exact_match(model, samples, batch_tokens=1)] == expected  # one at a time


def test_right_counts_tokens_after_true_ones(model):
    prompt, answer = list(range(3, 30)), [5, 6, 7, 8]
    ids = torch.tensor([[*prompt, *answer]])
    want = (model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1) == ids[0, len(prompt) :]).sum().item()
    [out] = exact_match(model, [make_sample(prompt, answer)])
    assert (out.right, out.of, out.hit) == (want, 4, want == 4)


def test_only_answer_logits_are_computed(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    try:
        exact_match(model, [make_sample(range(3, 40), [1, 2, 3])] * 4)
    finally:
        hook.remove()
    assert seen == [(4, 3, 97)]


@pytest.mark.parametrize("n", [1, 2, 5, 17, 100])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_bounds_solve_the_score_equation(n, confidence):
    """Definition: the p at which the observed share is exactly z standard errors *of that p* away."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    for hits in range(n + 1):
        for bound in wilson_interval(hits, n, confidence):
            assert abs(hits / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_wilson_known_values_and_edges():
    assert wilson_interval(5, 5) == (pytest.approx(0.5655, abs=1e-4), 1.0)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for bad in [(6, 5), (-1, 5)]:
        with pytest.raises(ValueError, match="hits"):
            wilson_interval(*bad)


def fake_task(tokenizer, *, length, depth, seed, ablate=False):
    rng = random.Random(f"{seed}/{length}")
    return make_sample(
        [rng.randrange(3, 97) for _ in range(length - 2)], [rng.randrange(97), rng.randrange(97)]
    )


def test_grid_rows_and_table(model):
    rows = grid(model, None, fake_task, lengths=[32, 16], depths=[0, 1], n={16: 3, 32: 2}, seed=1)
    assert [(r["length"], r["depth"], r["i"]) for r in rows] == [
        *((16, d, i) for d in (0, 1) for i in range(3)),
        *((32, d, i) for d in (0, 1) for i in range(2)),
    ]
    assert rows == grid(
        model, None, fake_task, lengths=[16, 32], depths=[0, 1], n={16: 3, 32: 2}, seed=1, batch_tokens=1
    )
    cells = table(rows, "length")
    assert [(c["length"], c["n"]) for c in cells] == [(16, 6), (32, 4)]
    for c in cells:
        mine = [r for r in rows if r["length"] == c["length"]]
        assert c["hits"] == sum(r["hit"] for r in mine) and c["accuracy"] == c["hits"] / c["n"]
        assert (c["low"], c["high"]) == wilson_interval(c["hits"], c["n"])
        assert c["digits"] == sum(r["right"] for r in mine) / (2 * c["n"])


def test_grid_goes_on_after_an_interruption(model, tmp_path):
    path = tmp_path / "partial.json"
    how = {"lengths": [16, 24], "depths": [0, 0.5, 1], "n": 2, "seed": 3, "partial": path, "batch_tokens": 16}
    whole = grid(model, None, fake_task, **{**how, "partial": None})

    calls = []

    def dies(tokenizer, **kw):
        calls.append(kw)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return fake_task(tokenizer, **kw)

    dies.__module__, dies.__name__ = fake_task.__module__, fake_task.__name__
    with pytest.raises(KeyboardInterrupt):
        grid(model, None, dies, **how)
    kept = json.loads(path.read_text())["rows"]
    assert 0 < len(kept) < len(whole)

    seen = []
    hook = model.register_forward_hook(lambda *a: seen.append(1))
    try:
        assert grid(model, None, fake_task, **how) == whole
    finally:
        hook.remove()
    assert len(seen) == len(whole) - len(kept)  # nothing was measured twice
    with pytest.raises(LcxError, match="another measurement"):
        grid(model, None, fake_task, **{**how, "seed": 4})
