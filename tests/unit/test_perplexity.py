"""Perplexity by position against transformers' own loss, and its control."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcx.errors import UnsupportedModelError
from lcx.tasks.perplexity import (
    bin_by_position,
    crossing,
    nll_by_position,
    nll_sliding,
    perplexity,
    perplexity_by_position,
    ratio_by_position,
)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Larger weights than the default, so that the predictions are far from uniform and depend on position.
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            p.data.mul_(8)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (75,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [1, 7, 74, 1024])
def test_equals_the_loss_of_transformers(model, ids, chunk):
    nll = nll_by_position(model, ids, chunk=chunk)
    with torch.no_grad():
        loss = model(ids[None], labels=ids[None]).loss
    assert nll.shape == (74,) and nll.dtype == torch.float32
    assert nll.std() > 0.5
    torch.testing.assert_close(nll.mean(), loss, atol=1e-5, rtol=1e-5)
    assert perplexity(model, ids[None], chunk=chunk) == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_logits_of_all_positions_are_never_made(model, ids):
    rows = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    nll_by_position(model, ids, chunk=10)
    handle.remove()
    assert max(rows) == 10 and sum(rows) == 74


def test_positions_and_mask_are_passed_through(model, ids):
    plain = nll_by_position(model, ids)
    shifted = nll_by_position(model, ids, position_ids=torch.arange(75)[None] + 5)
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=1e-4)  # RoPE is relative
    stretched = nll_by_position(model, ids, position_ids=torch.arange(75)[None] * 3)
    assert (stretched - plain).abs().max() > 1e-2
    diagonal = torch.eye(75, dtype=torch.bool)[None, None]  # every token sees only itself
    alone = nll_by_position(model, ids, attention_mask=diagonal)
    assert (alone - plain).abs()[1:].max() > 1e-2
    torch.testing.assert_close(alone[0], plain[0], atol=1e-5, rtol=1e-5)


def test_sliding_scores_every_token_once_from_a_fresh_window(model, ids):
    window, stride = 16, 6
    nll = nll_sliding(model, ids, window, stride, batch=3)
    assert nll.shape == (74,) and not nll.isnan().any()
    starts = [*range(0, 75 - window, stride), 75 - window]
    expected, done = torch.empty(74), 0
    for s in starts:  # the slow definition: one forward a window
        part = nll_by_position(model, ids[s : s + window])
        expected[done : s + window - 1] = part[done - s :]
        done = s + window - 1
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)


def test_sliding_in_one_window_is_the_plain_curve(model, ids):
    torch.testing.assert_close(nll_sliding(model, ids, 75), nll_by_position(model, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        nll_sliding(model, ids, 500), nll_by_position(model, ids), atol=1e-5, rtol=1e-5
    )


def test_bins():
    nll = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    bins = bin_by_position(nll, 2)
    assert [(b.start, b.mean, b.count) for b in bins] == [(0, 1.5, 2), (2, 3.5, 2), (4, 9.0, 1)]
    assert bins[0].std == pytest.approx(math.sqrt(0.5)) and math.isnan(bins[2].std)
    assert bins[1].perplexity == pytest.approx(math.exp(3.5))


@pytest.mark.parametrize("shape", [(2, 10), (1, 1), (1, 2, 3), (0,)])
def test_bad_shapes(model, shape):
    with pytest.raises(ValueError, match="one text"):
        nll_by_position(model, torch.zeros(shape, dtype=torch.long))


def test_bad_arguments(model, ids):
    with pytest.raises(ValueError, match="chunk"):
        nll_by_position(model, ids, chunk=0)
    for stride in (0, 16):
        with pytest.raises(ValueError, match="stride"):
            nll_sliding(model, ids, 16, stride)
    for nll, width in ((torch.zeros(0), 2), (torch.zeros(2, 2), 2), (torch.zeros(4), 0)):
        with pytest.raises(ValueError, match="bin_by_position"):
            bin_by_position(nll, width)
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        nll_by_position(model.model, ids)


def test_ratio_cancels_the_text_and_brackets_the_truth():
    g = torch.Generator().manual_seed(0)
    hardness = torch.randn(12, 1, generator=g)  # texts differ far more than positions
    control = 3 + hardness + 0.1 * torch.randn(12, 40, generator=g)
    plain = (
        control
        + torch.where(torch.arange(40) < 20, 0.0, math.log(3))
        + 0.1 * torch.randn(12, 40, generator=g)
    )
    ratio, low, high = ratio_by_position(plain, control, 10)
    assert ratio.shape == (4,)
    assert (low < ratio).all() and (ratio < high).all() and (high / low < 1.1).all()
    assert ratio.tolist() == pytest.approx([1, 1, 3, 3], rel=0.05)
    again = ratio_by_position(plain, control, 10)
    assert all(torch.equal(a, b) for a, b in zip((ratio, low, high), again, strict=True))
    one = ratio_by_position(plain[:1], control[:1], 10)
    torch.testing.assert_close(one[1], one[2])
    assert len(ratio_by_position(plain, control, 15)[0]) == 3
    # Reached between the middles of the bins at 15 and 25, at log 2 / log 3 of the way.
    assert crossing(torch.tensor([1.0, 1.0, 3.0]), 10) == pytest.approx(15 + 10 * math.log(2) / math.log(3))
    assert crossing(torch.tensor([1.0, 1.9]), 10) is None and crossing(torch.tensor([2.0, 1.0]), 10) == 5


def test_ratio_rejects_unpaired_curves():
    with pytest.raises(ValueError, match="two curves"):
        ratio_by_position(torch.zeros(2, 10), torch.zeros(2, 9), 5)
    with pytest.raises(ValueError, match="need curves"):
        ratio_by_position(torch.zeros(10), torch.zeros(10), 5)


def test_perplexity_by_position_is_the_exponential_of_the_mean():
    nll = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    value, low, high = perplexity_by_position(nll, 2)
    assert value.tolist() == pytest.approx([math.exp(2), math.exp(3.5)])
    assert low.tolist() == pytest.approx([math.exp(2), math.exp(2)])  # only the second text drawn
    assert high.tolist() == pytest.approx([math.exp(2), math.exp(5)])
