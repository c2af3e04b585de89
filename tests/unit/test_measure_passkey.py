"""The measurements of chapter 3 on a tiny model: what they return, and that a killed one goes on."""

import pytest
import torch
from test_tasks import PROSE, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lcx.measure import passkey, registry
from lcx.tasks import sample

NAMES = ["smollm2-passkey", "smollm2-wording", "smollm2-recall", "smollm2-context-use"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """(model, tokenizer) with one prose of its own, small sizes and an empty cache."""
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))
    monkeypatch.setattr(sample, "_sentences", lambda: (PROSE * 100, [0, len(PROSE)]))
    monkeypatch.setattr(passkey, "LENGTHS", {400: 2, 500: 1})
    monkeypatch.setattr(passkey, "WORDING_LENGTHS", (400, 500))
    monkeypatch.setattr(passkey, "RECALL_LENGTH", 1200)
    monkeypatch.setattr(passkey, "PER_CELL", 1)
    monkeypatch.setattr(passkey, "CONTEXTS", (100, 400))
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=4096,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    model.lcx_source = "made for this test"
    return model, tokenizer


def test_they_are_registered_under_the_names_the_chapter_reads():
    assert set(NAMES) <= set(registry)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_measures_nothing_again(bench, name):
    model, tokenizer = bench
    first = registry[name](model, tokenizer)
    ran = []
    model.register_forward_hook(lambda *a: ran.append(1))
    assert registry[name](model, tokenizer) == first and not ran


def test_passkey_has_every_cell_of_both_haystacks(bench):
    rows = passkey.passkey_grid(*bench)["rows"]
    found = [(r["haystack"], r["length"], r["depth"], r["i"]) for r in rows]
    assert len(found) == len(set(found)) == 2 * 5 * (2 + 1)
    assert len({(r["haystack"], r["seed"]) for r in rows}) == len(rows)  # no two samples share their numbers


def test_recall_holds_ablated_rows_apart(bench):
    rows = passkey.recall(*bench)["rows"]
    gone = [r for r in rows if r["ablated"]]
    assert {r["task"] for r in gone} == {"passkey in filler", "passkey in prose"} and len(gone) == 2 * 5
    assert {r["candidates"] for r in rows if r["task"] == "lines"} == {2, 5, 10, 20, 40}


def test_context_use_scores_the_same_tokens_at_every_context(bench):
    model, tokenizer = bench
    rows = passkey.context_use(model, tokenizer, samples=3, scored=16)["rows"]
    assert [(r["sample"], r["context"]) for r in rows] == [(i, c) for i in range(3) for c in (100, 400)]
    assert all(r["seen"] for r in rows if r["context"] == 400)
    assert not any(
        r["seen"] for r in rows if r["context"] == 100
    )  # the deepest needle, at 5/6, starts before that
