"""Measurements: the registry, the provenance in the file, and resuming after a kill."""

import json

import pytest
import torch

from lcx import measure, results
from lcx.corpora import Document
from lcx.errors import LcxError
from lcx.measure import perplexity
from tests.fake_sources import tiny_llama, tiny_tokenizer


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model and three long texts in place of the real ones, results and cache in a temporary folder."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.lcx_source = "random weights"
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(perplexity, "WIDTH", 32)
    monkeypatch.setattr(perplexity, "CONTROL", 16)
    texts = [Document(t, 1900, f"{t} said {list(range(60))}") for t in "abc"]
    monkeypatch.setattr("lcx.corpora.text", lambda name, split: texts)
    monkeypatch.setattr("lcx.models.load", lambda name: (model, tokenizer))
    monkeypatch.setattr(results, "results_dir", lambda: tmp_path / "results")
    return model, tokenizer, texts


def test_registry_names_what_the_book_reads():
    assert "smollm2-ppl-by-position" in measure.registry
    assert all(f.__doc__ and f.model != "" and isinstance(f.seed, int) for f in measure.registry.values())
    with pytest.raises(LcxError, match="no measurement 'ppl'"):
        measure.run("ppl")


def test_run_writes_figures_and_provenance(tiny, tmp_path, monkeypatch):
    @measure.measurement("probe", model="smollm2-135m", seed=7)
    def probe(model, tokenizer):
        """A probe."""
        assert torch.is_inference_mode_enabled()
        return {"value": 1}

    try:
        path = measure.run("probe")
    finally:
        del measure.registry["probe"]
    assert path == tmp_path / "results" / "probe.json"
    written = json.loads(path.read_text())
    assert (
        written["value"] == 1 and written["model"] == "smollm2-135m" and written["source"] == "random weights"
    )
    assert written["made_by"]["command"] == "lcx measure probe" and written["made_by"]["seed"] == 7
    assert set(results.PROVENANCE) == set(written["made_by"])


def test_perplexity_by_position_against_a_plain_computation(tiny):
    model, tokenizer, texts = tiny
    out = perplexity.by_position(model, tokenizer, length=80, texts=2)
    assert out["texts"] == ["a", "b"] and out["counts"] == [32, 32, 15] and out["window"] == 128
    ids = torch.tensor(tokenizer(texts[1].text).input_ids[:80])
    with torch.no_grad():
        logp = model(ids[None]).logits[0].log_softmax(-1)
        nll = torch.tensor([-logp[t, ids[t + 1]] for t in range(79)])
        for b, part in enumerate(nll.split(32)):
            assert out["plain"][1][b] == pytest.approx(part.mean().item(), abs=1e-4)
            assert out["plain_std"][1][b] == pytest.approx(part.std().item(), abs=1e-4)
        # The control: the token at 40 stands in the window that starts at 32, the first that holds it and its past.
        assert len(out["fresh"][1]) == 3 and out["fresh"] != out["plain"]


def test_finished_texts_survive_a_kill(tiny, monkeypatch):
    model, tokenizer, _ = tiny
    real, seen = perplexity.one_text, []

    def one_text(m, t, content, length):
        seen.append(content[0])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(m, t, content, length)

    monkeypatch.setattr(perplexity, "one_text", one_text)
    with pytest.raises(KeyboardInterrupt):
        perplexity.by_position(model, tokenizer, length=80, texts=3)
    out = perplexity.by_position(model, tokenizer, length=80, texts=3)
    assert seen == ["a", "b", "b", "c"]
    # Other weights never share the kept parts.
    model.lcx_source = "other"
    perplexity.by_position(model, tokenizer, length=80, texts=1)
    assert seen == ["a", "b", "b", "c", "a"] and out["texts"] == ["a", "b", "c"]


def test_a_text_that_is_too_short(tiny):
    model, tokenizer, _ = tiny
    with pytest.raises(LcxError, match="use a smaller length"):
        perplexity.by_position(model, tokenizer, length=10_000)
