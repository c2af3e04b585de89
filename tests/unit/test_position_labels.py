"""PositionLabels: which labels an example gets, the mask it cannot do without, and what a model makes of both."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import lcx
from lcx.errors import LcxError
from lcx.finetune_cream import PositionLabels, Rows
from lcx.train import Documents
from tests.unit.test_train import make_tiny, model_of

N, FACTOR = 64, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny):
    return model_of(tiny)


def rows(count=6, **changes):
    documents = Documents([range(count * N + 1)], N, 1)
    return Rows(documents, **{"batch": 2, "steps": 9, "seed": 3, **changes})


def test_labels_depend_on_seed_and_index_alone():
    data, state = rows(), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    collator = PositionLabels(functools.partial(lcx.cream_positions, N, FACTOR), seed=3)
    whole = collator([data[i] for i in range(12)])["position_ids"]
    assert whole.shape == (12, N) and whole.dtype == torch.int64
    assert len(whole.unique(dim=0)) > 8
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    assert (whole[:, 0] == 0).all() and (whole[:, -1] == N * FACTOR - 1).all() and (whole.diff() > 0).all()
    for workers, size in ((0, 4), (2, 3), (2, 4)):
        loader = torch.utils.data.DataLoader(data, size, collate_fn=collator, num_workers=workers)
        batches = list(loader)
        assert torch.equal(torch.cat([b["position_ids"] for b in batches])[:12], whole)
        assert all((b["attention_mask"] == 1).all() and b.keys() >= {"input_ids", "labels"} for b in batches)
    assert torch.equal(collator([data[7], data[2]])["position_ids"], whole[[7, 2]])
    other = PositionLabels(collator.draw, seed=4)([data[i] for i in range(12)])["position_ids"]
    assert not torch.equal(other, whole)


def test_a_row_that_comes_again_has_other_labels_and_another_place():
    data = rows()
    assert len(data) == 18
    passes = [[int(data[i]["input_ids"][0, 0]) for i in range(6 * p, 6 * p + 6)] for p in range(3)]
    assert all(sorted(p) == [N * i for i in range(6)] for p in passes) and passes[0] != passes[1]
    assert [data[i]["index"] for i in range(18)] == list(range(18))
    assert len(rows(batch=7)) == 6  # too few for a step: refused by finetune


@pytest.fixture
def batch():
    """Two rows, their labels in three runs of 21, 22 and 21, and their mask."""
    draw = functools.partial(lcx.cream_positions, N, FACTOR, p_relativity=1.0)
    made = PositionLabels(draw, 1)([rows()[0], rows()[1]])
    made["input_ids"] %= 1024
    assert ((made["position_ids"].diff() != 1).sum(1) == 2).all()
    return {k: v for k, v in made.items() if k in ("input_ids", "position_ids", "attention_mask")}


def causal(together=None):
    """[B or 1, 1, N, N], True where a query sees a key; together [B, N]: with equal numbers alone."""
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    return mask if together is None else mask & (together[:, None, :, None] == together[:, None, None])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mask_trap(model, batch, checkpointing):
    """A jump in the labels cuts the attention unless a mask is given: the trainer's batches give one."""
    model.train()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    words = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def logits(mask):
        given = {"attention_mask": mask, "position_ids": batch["position_ids"], "use_cache": False}
        out = model(inputs_embeds=words, **given).logits
        (from_tail,) = torch.autograd.grad(out[:, -1].logsumexp(-1).sum(), words)
        return out.detach(), from_tail[
            :, :21
        ].norm().item()  # gradient that the head gets from the last token

    (given, gradient), (explicit, same), (without, none) = map(
        logits, (batch["attention_mask"], causal(), None)
    )
    assert_close(given, explicit, atol=1e-5, rtol=1e-5)
    assert gradient > 1e-3 and gradient == pytest.approx(same, rel=1e-4)
    runs = torch.nn.functional.pad(batch["position_ids"].diff() != 1, (1, 0)).cumsum(1)
    assert_close(without, logits(causal(runs))[0], atol=1e-5, rtol=1e-5)  # the trap: every run alone
    assert none == 0 and (given - without).abs().max() > 1e-2


def test_only_distances_between_labels_count(model, batch):
    with torch.no_grad():
        given = model(**batch).logits
        for shift in (1, 77, 4096):
            moved = batch | {"position_ids": batch["position_ids"] + shift}
            assert_close(model(**moved).logits, given, atol=2e-4, rtol=1e-4)
        other = batch | {"position_ids": batch["position_ids"] * 2}
        assert (model(**other).logits - given).abs().max() > 1e-2


def test_ordinary_labels_are_no_labels(model, batch):
    ordinary = PositionLabels(functools.partial(lcx.cream_positions, N, 1))([rows()[0], rows()[1]])
    with torch.no_grad():
        plain = model(batch["input_ids"]).logits
        batch["position_ids"] = ordinary["position_ids"]
        assert_close(model(**batch).logits, plain, atol=1e-6, rtol=1e-6)


def test_linear_scaling_divides_the_labels(model, batch):
    with torch.no_grad():
        divided = model(**batch | {"position_ids": batch["position_ids"] / FACTOR}).logits
        with lcx.scale_rope(model, "linear", FACTOR):
            assert_close(model(**batch).logits, divided, atol=2e-5, rtol=1e-5)


def test_a_sampler_of_ones_own_is_asked_for_each_row():
    longrecipe = lambda rng: lcx.longrecipe_positions([20, 30, 14], FACTOR, rng)  # noqa: E731
    got = PositionLabels(longrecipe, 3)([rows()[i] for i in range(4)])["position_ids"]
    drawn = [longrecipe(np.random.default_rng([3, i])) for i in range(4)]
    assert torch.equal(got, torch.from_numpy(np.stack(drawn)))


def test_examples_of_another_length_are_refused():
    collator = PositionLabels(functools.partial(lcx.pose_positions, 32, 2))
    with pytest.raises(LcxError, match="examples of 20 tokens for 32 position labels: join short texts"):
        collator([{"input_ids": torch.arange(20), "index": 0}])
