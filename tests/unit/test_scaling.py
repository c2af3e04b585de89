import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lcx.errors import LcxError
from lcx.methods.scaling import METHODS, scale_rope


def llama(head_dim=32, window=64, theta=10000.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=window,
        rope_theta=theta,
    )
    return LlamaForCausalLM(config).eval()


def inv_freq(model):
    return model.model.rotary_emb.inv_freq.double()


IDS = torch.arange(3, 60)[None]


def test_linear_is_the_published_division():
    m = llama()
    plain = inv_freq(m)
    with scale_rope(m, "linear", 8):
        torch.testing.assert_close(inv_freq(m), plain / 8, rtol=1e-6, atol=0)
        assert m.config.max_position_embeddings == 512


def test_ntk_leaves_the_first_and_divides_the_last():
    m = llama(head_dim=128)
    plain = inv_freq(m)
    with scale_rope(m, "ntk", 8):
        ratio = plain / inv_freq(m)
        assert m.config.rope_parameters["rope_theta"] == pytest.approx(82684.6, abs=0.1)
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(8, rel=1e-5)


# Effective division of dimension j at d = 128, theta 1e4, window 4096, factor 8 (section 3.4 of the specification)
TABLE = {
    20: (1.00, 1.00),
    25: (1.20, 2.35),
    30: (1.51, 3.69),
    35: (2.02, 5.04),
    40: (3.06, 6.39),
    45: (6.30, 7.73),
    46: (8, 8),
}


@pytest.mark.parametrize("method,column", [("yarn", 0), ("yarn_harmonic", 1)])
def test_yarn_blends_match_their_table(method, column):
    m = llama(head_dim=128, window=4096)
    plain = inv_freq(m)
    with scale_rope(m, method, 8):
        ratio = plain / inv_freq(m)
        assert m.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(8) + 1)
    for j, row in TABLE.items():
        assert ratio[j].item() == pytest.approx(row[column], abs=0.006), j


def test_linear_equals_divided_positions():
    m = llama()
    with torch.no_grad(), scale_rope(m, "linear", 4):
        scaled = m(IDS).logits
    with torch.no_grad():
        fractional = m(
            IDS, position_ids=torch.arange(IDS.shape[1])[None] / 4, attention_mask=torch.ones_like(IDS)
        ).logits
    torch.testing.assert_close(scaled, fractional, rtol=0, atol=1e-5)


def test_dynamic_changes_nothing_inside_the_window():
    m = llama()
    with torch.no_grad():
        plain = m(IDS).logits
        with scale_rope(m, "dynamic", 8):
            torch.testing.assert_close(m(IDS).logits, plain, rtol=0, atol=1e-6)
            beyond = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(0))
            m(beyond)
            theta = 10000.0 * (200 / 64) ** (32 / 30)
            assert inv_freq(m)[-1].item() == pytest.approx(theta ** (-30 / 32), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_exit_restores_bit_equal_logits_also_after_an_exception(method):
    m = llama()
    with torch.no_grad():
        before = m(IDS).logits
        with pytest.raises(RuntimeError), scale_rope(m, method, 4):
            m(IDS)
            raise RuntimeError
        assert torch.equal(m(IDS).logits, before)
    assert m.config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert m.config.max_position_embeddings == 64


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_keep_the_scaling(method, tmp_path):
    m = llama()
    scale_rope(m, method, 4)
    m.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, m(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_float32_under_half_precision(dtype):
    m = llama()
    scale_rope(m, "yarn", 4)
    exact = inv_freq(m).clone()
    m.to(dtype)
    assert m.model.rotary_emb.inv_freq.dtype == torch.float32 and torch.equal(inv_freq(m), exact)
    assert m.lm_head.weight.dtype == dtype
    plain = llama().to(dtype)  # the trap itself: without scale_rope the cast reaches the frequencies
    assert plain.model.rotary_emb.inv_freq.dtype == dtype


def test_bad_settings_are_one_clear_line():
    m = llama()
    for args in (("nkt", 4), ("linear", 0.5)):
        with pytest.raises(LcxError) as e:
            scale_rope(m, *args)
        assert "\n" not in str(e.value)
        assert m.config.rope_parameters["rope_type"] == "default"
    with scale_rope(m, "linear", 4), pytest.raises(LcxError, match="already"):
        scale_rope(m, "yarn", 4)
