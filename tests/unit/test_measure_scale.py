"""The measurements for a GPU, at tiny size on the CPU: the same functions, the same figures."""

import math

import pytest
import torch

from lcx import measure
from lcx.errors import LcxError
from lcx.measure import focused_scale as scale


@pytest.mark.parametrize("tier", ["device", "host"])
def test_prefill_counts_time_and_bytes(tier):
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    config |= {"vocab_size": 50, "max_position_embeddings": 16}
    state = torch.get_rng_state()
    row = scale.prefill(config, (1, 2), 100, "cpu", torch.bfloat16, tier)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
    assert row["bytes_per_token"] == 2 * 2 * 32 * 2 and row["length"] == 100
    # 100 tokens, of which 16 stayed local; the first decoded token pushed them out, 8 are local now.
    assert row["memory_bytes"] == 100 * row["bytes_per_token"]
    assert (
        row["prefill_seconds"] > 0
        and row["seconds_per_token"] > 0
        and row["peak_bytes"] > row["memory_bytes"]
    )


def test_shapes_are_those_of_the_released_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, parameters in (("3B", 3_426_473_600), ("7B", 6_738_546_688)):
        with torch.device("meta"):
            config = LlamaConfig(**scale.SHAPES[name], num_attention_heads=32)
            model = LlamaForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.slow
def test_a_model_trained_by_crossbatch_is_compared_with_the_plain_one(tmp_path):
    from lcx.finetune import finetune
    from lcx.finetune_focused import FocusedSettings
    from lcx.models import load

    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. The sun is yellow. " * 400)
    settings = FocusedSettings("lm-256", (str(text),), window=64, steps=4, batch_size=2, learning_rate=1e-3)
    card = finetune(settings, tmp_path / "out")
    assert card["steps"] == 4
    plain, tokenizer = load("lm-256", device="cpu")
    tuned, _ = load(tmp_path / "out", device="cpu")
    texts = [tokenizer(text.read_text()).input_ids]
    rows = scale.compare(plain, tuned, tokenizer, texts, (192, 384), samples=1, last=32)
    assert [r["model"] for r in rows[::2]] == ["plain", "memory, not trained for it", "trained by crossbatch"]
    assert all(r["of"] == 5 and 0 <= r["passkeys"] <= 5 and math.isfinite(r["loss"]) for r in rows)
    by = {(r["model"], r["length"]): r["loss"] for r in rows}
    assert by["trained by crossbatch", 384] < by["memory, not trained for it", 384], (
        "trained on this very text"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
@pytest.mark.parametrize("name", ["focused-shapes", "smollm2-focused"])
def test_without_a_gpu_one_line_says_so(name):
    with pytest.raises(LcxError, match="needs a CUDA GPU: run it on one"):
        measure.run(name)
