"""Contracts that every method keeps on every family (the matrix of conftest.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from .conftest import LANDMARK, LENGTH, logits, of_tokens, tiny_model, tokens

TOLERANCE = {
    "atol": 2e-4,
    "rtol": 1e-4,
}  # float32, sums in another order; the logits have a spread of about 3


def test_a_later_token_changes_no_earlier_logit(method, model):
    ids = tokens()
    with method.attach(model):
        before = of_tokens(logits(model, ids))
        for t in (1, LENGTH // 2, LENGTH - 1):
            changed = ids.clone()
            changed[0, t] = ids[0, t] % (LANDMARK - 1) + 1
            after = of_tokens(logits(model, changed))
            assert_close(after[:, :t], before[:, :t], **TOLERANCE)
            assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-3, (
                "the change must be seen from there on"
            )


def test_rows_of_a_batch_do_not_see_each_other(method, model):
    ids = tokens(rows=3)
    with method.attach(model):
        together = logits(model, ids)
        for row in range(3):
            assert_close(together[row : row + 1], logits(model, ids[row : row + 1]), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 5])
def test_padding_changes_nothing(method, model, side, filler):
    lengths = (LENGTH, LENGTH - 9, 1)
    ids, mask = torch.full((3, LENGTH), filler), torch.zeros(3, LENGTH, dtype=torch.long)
    spans = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
    rows = [tokens(length=n, seed=i) for i, n in enumerate(lengths)]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = row[0], 1
    with method.attach(model):
        padded = logits(model, ids, mask)
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            assert_close(padded[i, span], logits(model, row)[0], **TOLERANCE)


def test_one_shot_equals_pieces(method, model):
    ids = tokens(rows=2)
    with method.attach(model):
        whole = logits(model, ids)
        for sizes in method.pieces:
            assert sum(sizes) == LENGTH
            cache = DynamicCache(config=model.config)
            pieces = [logits(model, piece, past_key_values=cache) for piece in ids.split(sizes, dim=1)]
            assert_close(torch.cat(pieces, 1), whole, **TOLERANCE)


def test_equals_the_plain_model_while_it_has_nothing_to_do(method, model):
    ids = tokens(rows=2)
    plain = of_tokens(logits(model, ids))
    with method.attach(model):
        inside = of_tokens(logits(model, ids))
    if method.equals_plain:
        assert_close(inside, plain, **TOLERANCE)
    else:
        assert (inside - plain).abs().max() > 1e-2


def test_leaves_no_trace_also_after_an_error(method, model):
    ids = tokens()
    before, names = logits(model, ids), [set(vars(m)) for m in model.modules()]
    with method.attach(model):
        logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(RuntimeError, match="on purpose"), method.attach(model):
        logits(model, ids)
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, ids), before)
    assert [set(vars(m)) for m in model.modules()] == names


def test_generate_agrees_with_the_logits_and_with_a_left_padded_batch(method, model):
    """Each new token against a fresh run over all tokens, or against the row's own decoding where windows regroup."""
    rows = [tokens(length=LENGTH), tokens(length=LENGTH - 7, seed=1)]
    ids = torch.stack([rows[0][0], torch.cat([torch.zeros(7, dtype=torch.long), rows[1][0]])])
    mask = (ids > 0).long()
    with method.attach(model):
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, LENGTH:]
        for i, row in enumerate(rows):
            cache, new = DynamicCache(config=model.config), row
            for _ in range(6):
                out = logits(model, new, past_key_values=cache) if method.regroups else logits(model, row)
                new = out[:, -1:].argmax(-1)
                row = torch.cat([row, new], 1)
            assert batch[i].tolist() == row[0, -6:].tolist()


def test_gradients_are_the_same_with_checkpointing(method, family):
    ids = tokens(rows=2)
    grads = []
    for checkpointing in (False, True):
        model, calls = tiny_model(family).train(), []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            new = getattr(
                model, "activation_checkpointing_enable", None
            )  # its name from transformers 5.2x on
            (new or model.gradient_checkpointing_enable)()
        with method.attach(model):
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert len(calls) == 1 + checkpointing, "with checkpointing the layer runs again in the backward pass"
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, g in grads[0].items():
        assert g is not None and g.isfinite().all() and g.abs().max() > 0, name
        assert_close(grads[1][name], g, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)], ids=str)
def test_half_precision(method, model, dtype, tolerance):
    """Mean error of the logits relative to their spread: the formats keep 8 and 11 bits."""
    ids = tokens(rows=2)
    half = copy.deepcopy(model).to(dtype)
    with method.attach(model):
        exact = of_tokens(logits(model, ids))
    with method.attach(half):
        rounded = of_tokens(logits(half, ids))
    assert rounded.dtype == dtype and rounded.isfinite().all()
    error = (rounded.float() - exact).abs().mean() / exact.std()
    assert error < tolerance


def test_saved_model_loads_in_plain_transformers(method, model, tmp_path):
    ids = tokens()
    before = logits(model, ids)
    with method.attach(model):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and (tmp_path / "model.safetensors").is_file()
    assert torch.equal(logits(loaded, ids), before)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings
