"""The scaling measurement on a tiny model: each method's figures against a computation of their own."""

import json

import pytest
import torch

from lcx.corpora import Document
from lcx.errors import LcxError
from lcx.measure import smollm2_scaling as measured
from lcx.methods.scaling import scale_rope
from lcx.tasks.perplexity import nll_by_position
from tests.fake_sources import tiny_llama, tiny_tokenizer


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.lcx_source, model.config.max_position_embeddings = "random weights", 32
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "WIDTH", 16)
    texts = [Document(t, 1900, f"{t} said {list(range(60))}") for t in "abc"]
    monkeypatch.setattr("lcx.corpora.text", lambda name, split: texts)
    return model, tokenizer, texts


def test_every_method_is_the_scaled_model_on_the_same_tokens(tiny):
    model, tokenizer, texts = tiny
    before = model.model.rotary_emb
    out = measured.by_scaling(model, tokenizer, length=64, texts=2)
    assert out["texts"] == ["a", "b"] and (out["window"], out["factor"]) == (32, 2.0)
    assert model.model.rotary_emb is before and model.config.max_position_embeddings == 32
    ids = torch.tensor(tokenizer(texts[1].text).input_ids[:64])
    for method in ("linear", "ntk", "yarn"):
        with scale_rope(model, method, 2):
            want = [part.mean().item() for part in nll_by_position(model, ids).split(16)]
        assert out["nll"][method][1] == pytest.approx(want, abs=1e-4)
    assert len({str(rows) for rows in out["nll"].values()}) == 3, "three methods, three curves"


def test_dynamic_ntk_needs_no_measurement_of_its_own(tiny):
    model, tokenizer, texts = tiny
    ids = torch.tensor(tokenizer(texts[0].text).input_ids[:64])
    with scale_rope(model, "dynamic"):
        whole = nll_by_position(model, ids)
    with scale_rope(model, "dynamic"):
        inside = nll_by_position(model, ids[:32])
    torch.testing.assert_close(inside, nll_by_position(model, ids)[:31])
    with scale_rope(model, "ntk", 2):
        torch.testing.assert_close(whole, nll_by_position(model, ids))


def test_finished_texts_are_not_read_again(tiny, tmp_path, monkeypatch):
    model, tokenizer, _ = tiny
    first = measured.by_scaling(model, tokenizer, length=64, texts=1)
    monkeypatch.setattr(measured, "one_text", None)
    assert measured.by_scaling(model, tokenizer, length=64, texts=1) == first
    assert len(json.loads(next((tmp_path / "measure").iterdir()).read_text())) == 3
    with pytest.raises(LcxError, match="tokens, 9000 are needed"):
        measured.by_scaling(model, tokenizer, length=9000, texts=1)
