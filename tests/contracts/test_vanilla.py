"""The plain model against an independent definition, and the two traps of transformers that every method must avoid."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .conftest import LENGTH, logits, tiny_model, tokens
from .reference import reference_logits

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def test_agrees_with_the_float64_definition(model):
    ids = tokens(rows=2, seed=4)
    for row, got in zip(ids, logits(model, ids), strict=True):
        assert_close(got.double(), reference_logits(model, row), **TOLERANCE)


@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 16}], ids=str
)
def test_agrees_with_the_float64_definition_at_other_shapes(changes):
    model = tiny_model("llama", **changes)
    ids = tokens(seed=5)
    assert_close(logits(model, ids)[0].double(), reference_logits(model, ids[0]), **TOLERANCE)


def test_only_distances_between_positions_matter(model):
    ids, positions = tokens(), torch.arange(LENGTH)[None]
    mask = torch.ones_like(ids)
    near = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert_close(logits(model, ids, attention_mask=mask, position_ids=positions + 100), near, **TOLERANCE)
    stretched = logits(model, ids, attention_mask=mask, position_ids=positions * 3)
    assert (stretched - near).abs().max() > 1e-2


# Trap 1: an attention function is chosen by name, and its mask by the same name from another table. ------------------


def _attend(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention by its formula, which obeys the mask it is given, if it is given one."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@contextmanager
def _registered(name, mask_function=None):
    tables = [(AttentionInterface, _attend)]
    if mask_function is not None:
        tables.append((AttentionMaskInterface, mask_function))
    try:
        for table, function in tables:
            table.register(name, function)
        yield name
    finally:
        for table, _ in tables:
            table._global_mapping.pop(name, None)


def _always_masked(**kwargs):
    """sdpa_mask leaves the mask out where torch's own kernel is told `is_causal`; a formula needs it every time."""
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})


def test_trap_an_attention_function_without_a_mask_function_is_silently_not_causal():
    ids = tokens()
    later = ids.clone()
    later[0, -1] = ids[0, -1] % 90 + 1
    plain = logits(tiny_model("llama"), ids)
    with _registered("lcx_test_without_mask") as name:
        model = tiny_model("llama")
        model.set_attn_implementation(name)
        leak = (logits(model, later) - logits(model, ids))[:, :-1].abs().max()
        assert leak > 1e-2, (
            "transformers now masks by itself: the book's exhibit and lcx's guard are out of date"
        )
    with _registered("lcx_test_with_mask", _always_masked) as name:
        model = tiny_model("llama")
        model.set_attn_implementation(name)
        assert_close(logits(model, ids), plain, **TOLERANCE)
        assert_close(logits(model, later)[:, :-1], plain[:, :-1], **TOLERANCE)


# Trap 2: positions that jump are taken for several packed sequences, unless a mask is given. ----------------------


def test_trap_jumping_positions_without_a_mask_silently_cut_the_attention(model):
    ids, cut = tokens(), LENGTH // 2
    positions = torch.arange(LENGTH)
    positions[cut:] += 50
    wanted = reference_logits(model, ids[0], positions)
    silent = logits(model, ids, position_ids=positions[None], use_cache=False)[0]
    alone = logits(model, ids[:, cut:])[0]
    assert_close(silent[cut:], alone, **TOLERANCE)  # what stands after the jump has lost everything before it
    assert (silent[cut:].double() - wanted[cut:]).abs().max() > 1e-2
    masked = logits(
        model, ids, position_ids=positions[None], attention_mask=torch.ones_like(ids), use_cache=False
    )[0]
    assert_close(masked.double(), wanted, **TOLERANCE)
