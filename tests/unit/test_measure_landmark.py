"""The measurements of chapter 8 ask what they say they ask, and do not measure twice what they have."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcx import zoo
from lcx.measure import landmark_decode, landmark_needles


def made(name="landmark-256"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**zoo.recipe(name).config)).eval()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))


def test_every_needle_of_every_text_is_there():
    make, first = landmark_needles.material("landmark-256")
    documents, needles = landmark_needles.texts(3, 512, make, first)
    assert documents.shape == (3, 480 - 8) and needles.shape == (3, 4, 8)
    for document, row in zip(documents, needles, strict=True):
        spans = document.unfold(0, 8, 1)
        for needle in row:
            assert (spans == needle).all(1).sum() == 1 and len(needle.unique()) == 8


@pytest.mark.parametrize("mode", ["retrieval", "dense", "window", "plain"])
def test_right_answers_are_counted(mode):
    """A model that always says token 20 is right where 20 is the answer, and never for a whole needle."""
    model = made("landmark-256-plain" if mode == "plain" else "landmark-256")
    model.lm_head.weight.data.zero_()
    model.lm_head.register_forward_hook(lambda m, x, out: out.index_fill(-1, torch.tensor([20]), 1.0))
    documents, needles = landmark_needles.texts(8, 512, *landmark_needles.material("landmark-256"))
    figures = landmark_needles.found(model, documents, needles, mode)
    assert (figures["answers"], figures["scored"], figures["whole"]) == (32, 192, 0)
    assert figures["accuracy"] == pytest.approx((needles[..., 2:] == 20).double().mean().item()) != 0
    assert figures["whole_low"] == 0 < figures["whole_high"] < 0.2
    if mode == "retrieval":
        # All whole blocks, in all layers: 4 heads of 32, keys and values, float32.
        assert figures["memory_bytes"] == 8 * (472 // 15) * 16 * 3 * 2 * 128 * 4
        assert set(figures["bytes_read"]) == {"landmarks", "blocks", "local"}


def test_a_window_holds_whole_blocks_with_the_question(monkeypatch):
    model, seen = made(), []
    model.model.embed_tokens.register_forward_hook(lambda m, x, out: seen.append(x[0].shape[1]))
    documents, needles = landmark_needles.texts(1, 512, *landmark_needles.material("landmark-256"))
    landmark_needles.found(model, documents, needles, "window", top_k=4)
    assert set(seen) == {256 - 5 * 16}  # one chunk, landmarks included


def test_finished_rows_are_kept(monkeypatch, capsys):
    monkeypatch.setattr(landmark_needles, "TEXTS", {256: 2, 512: 1})
    monkeypatch.setattr(landmark_needles, "trained", lambda name, seed: made(name))
    monkeypatch.setattr(landmark_needles, "SEEDS", (0,))
    monkeypatch.setattr(landmark_needles, "TOP_K", (2, 4))
    few = [c for c in landmark_needles.cells() if c[0] != "landmark-text"]
    monkeypatch.setattr(landmark_needles, "cells", lambda: few)
    first = landmark_needles.landmark_needles()
    assert [(r["mode"], r["top_k"], r["tokens"]) for r in first["rows"]] == [c[2:] for c in few]
    monkeypatch.setattr(landmark_needles, "trained", None)
    assert landmark_needles.landmark_needles() == first


def test_disk_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(landmark_needles, "DISK_TOKENS", 1024)
    monkeypatch.setattr(landmark_needles, "DISK_TEXTS", 2)
    figures = landmark_needles.landmark_disk(made(), None)
    assert figures["answers"] == 8 and len(figures["rows"]) == 2
    assert all(r["peak_mib"] > 0 and r["bytes_read"]["blocks"] > 0 for r in figures["rows"])


def test_a_decoding_step_reads_what_the_formula_says(monkeypatch):
    monkeypatch.setattr(landmark_decode, "LENGTHS", (1024, 2048))
    monkeypatch.setattr(landmark_decode, "HEADS", 2)
    monkeypatch.setattr(landmark_decode, "HEAD_DIM", 8)
    monkeypatch.setattr(landmark_decode, "REPEATS", 2)
    for row in landmark_decode.landmark_decode()["rows"]:
        assert row["bytes"] == row["formula_bytes"] < row["dense_bytes"]
        assert min(row[f"{name}_ms"] for name in ("landmark", "dense", "scoring")) > 0


def test_a_decoding_step_is_the_attention_it_stands_for(monkeypatch):
    """With as many blocks as there are, the step gives grouped softmax over all tokens at their true places."""
    import lcx
    from lcx.methods.rope import rotate

    monkeypatch.setattr(landmark_decode, "HEADS", 2)
    monkeypatch.setattr(landmark_decode, "HEAD_DIM", 8)
    monkeypatch.setattr(landmark_decode, "TOP_K", 4)
    landmark, cache, heads, (k, v) = landmark_decode.filled(256)
    out = landmark_decode.step(landmark, cache, heads)()
    cos, sin = landmark._rotation(257, k)
    keys = k.unflatten(2, (-1, 64))  # rotated by the offset in the block: add the block's own place
    place = torch.arange(4) * 64
    keys = torch.stack(
        [rotate(keys[:, :, b], *(t[p].expand(64, -1) for t in (cos, sin))) for b, p in enumerate(place)], 2
    )
    keys = torch.cat([keys.flatten(2, 3), rotate(heads.k, cos[256:257], sin[256:257])], 2)
    q = rotate(heads.q, cos[256:257], sin[256:257])
    expected = lcx.landmark_attention(q, keys, torch.cat([v, heads.v], 2), 64)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
