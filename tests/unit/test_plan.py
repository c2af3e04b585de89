"""The closed forms of lcx.plan against PyTorch's own FLOP counter, real caches and real parameter counts."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from lcx import plan
from lcx.errors import LcxError, UnsupportedModelError
from lcx.plan import ModelShape

TINY = [
    ModelShape("mha", 2, 48, 4, 4, 12, 96, 101),
    ModelShape("gqa", 3, 72, 9, 3, 8, 80, 64, tied=True),
    ModelShape("mqa", 1, 64, 8, 1, 8, 200, 33),
    ModelShape("wide-heads", 2, 40, 4, 2, 20, 56, 50),  # heads * head_dim is not hidden, as in Qwen3
]
by_name = pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)


def random_model(shape):
    config = shape.to_config()
    config._attn_implementation = "eager"  # the counter does not know PyTorch's fused CPU kernel
    return LlamaForCausalLM(config).eval()


def count(model, ids, **kwargs):
    """(FLOPs in projections and MLP and logits, FLOPs in attention products, the cache)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, use_cache=True, **kwargs)
    flops = counter.get_flop_counts()
    # Transformers 5.0 makes RoPE's angles by a product, later versions elementwise.
    rope = flops.get("LlamaForCausalLM.model.rotary_emb", {})
    ops = {str(op): n - rope.get(op, 0) for op, n in flops["Global"].items()}
    return ops["aten.mm"], ops["aten.bmm"], out.past_key_values


@by_name
@pytest.mark.parametrize("length", [1, 7, 32])
def test_prefill_and_cache_are_exact(shape, length):
    ids = torch.zeros(1, length, dtype=torch.long)
    mm, bmm, cache = count(random_model(shape), ids, logits_to_keep=1)
    flops = plan.flops_prefill(shape, length, causal=False)
    assert bmm == flops.attention
    assert mm == flops.projections + flops.mlp + flops.logits
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == plan.kv_bytes(shape, length, torch.float32)


@by_name
def test_decode_is_exact(shape):
    model = random_model(shape)
    *_, cache = count(model, torch.zeros(1, 19, dtype=torch.long), logits_to_keep=1)
    mm, bmm, _ = count(model, torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    flops = plan.flops_decode(shape, cached=19)
    assert bmm == flops.attention
    assert mm + bmm == flops.total


@by_name
def test_all_logits(shape):
    mm, bmm, _ = count(random_model(shape), torch.zeros(1, 11, dtype=torch.long))
    assert mm + bmm == plan.flops_prefill(shape, 11, causal=False, logits=11).total


@by_name
def test_causal_halving_counts_the_pairs_of_the_mask(shape):
    pairs = int(torch.ones(23, 23).tril().sum())
    full, causal = (plan.flops_prefill(shape, 23, causal=c).attention for c in (False, True))
    assert causal * 23 * 23 == full * pairs


@by_name
def test_prefill_is_the_sum_of_decode_steps(shape):
    steps = [plan.flops_decode(shape, t) for t in range(17)]
    whole = plan.flops_prefill(shape, 17, logits=17)
    assert sum(s.total for s in steps) == whole.total
    assert sum(s.attention for s in steps) == whole.attention


@pytest.mark.parametrize("shape", [*TINY, *plan.SHAPES.values()], ids=lambda s: s.name)
def test_parameters_and_round_trip_through_a_config(shape):
    with FakeTensorMode():
        model = random_model(shape)
    assert shape.params == sum(p.numel() for p in model.parameters())  # tied weights are one parameter
    assert plan.weight_bytes(shape, "float32") == sum(p.nbytes for p in model.parameters())
    assert ModelShape.from_config(model.config, shape.name) == shape


@pytest.mark.parametrize("name", ["SmolLM2-135M", "OpenLLaMA-3B", "LLaMA-7B", "Llama-3.1-8B"])
def test_full_size_models_without_weights(name):
    shape = plan.SHAPES[name]
    with FakeTensorMode():
        mm, bmm, cache = count(random_model(shape), torch.zeros(2, 4096, dtype=torch.long), logits_to_keep=1)
    flops = plan.flops_prefill(shape, 4096, causal=False)
    assert (mm, bmm) == (2 * (flops.projections + flops.mlp + flops.logits), 2 * flops.attention)
    assert sum(c.keys.nbytes + c.values.nbytes for c in cache.layers) == plan.kv_bytes(
        shape, 4096, "float32", batch=2
    )


@pytest.mark.parametrize(
    "name, params",
    [
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM2-360M", 361_821_120),
        ("LLaMA-7B", 6_738_415_616),
        ("Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_parameter_counts(name, params):
    assert plan.SHAPES[name].params == params


def test_bytes_per_token():
    assert plan.kv_bytes(plan.SHAPES["LLaMA-7B"], 1) == 512 * 1024
    assert plan.kv_bytes(plan.SHAPES["OpenLLaMA-3B"], 1) == 332_800
    assert plan.kv_bytes(plan.SHAPES["SmolLM2-135M"], 1) == 23_040
    three = plan.SHAPES["OpenLLaMA-3B"]
    assert plan.kv_bytes(ModelShape(**{**vars(three), "layers": 3}), 1) == 38_400  # FoT's memory layers alone


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("against", ["mlp", "linear"])
@pytest.mark.parametrize("shape", [*TINY, *plan.SHAPES.values()], ids=lambda s: s.name)
def test_crossover_is_the_first_length_where_attention_is_dearer(shape, against, causal):
    def behind(t):
        f = plan.flops_prefill(shape, t, causal=causal)
        return f.attention < f.mlp + (f.projections if against == "linear" else 0)

    at = plan.crossover_length(shape, causal=causal, against=against)
    assert not behind(at)
    assert at == 1 or behind(at - 1)


def test_crossover_does_not_depend_on_kv_heads():
    shape = plan.SHAPES["LLaMA-7B"]
    assert (
        plan.crossover_length(shape)
        == 3 * shape.intermediate - 1
        == plan.crossover_length(shape.with_kv_heads(1))
    )


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("device", list(plan.DEVICES))
@pytest.mark.parametrize("shape", plan.SHAPES.values(), ids=lambda s: s.name)
def test_max_context_fits_and_one_more_token_does_not(shape, device, all_logits):
    most = plan.max_context(shape, device, all_logits=all_logits)

    def needs(t):
        logits = plan.logits_bytes(shape, t if all_logits else 1)
        return plan.weight_bytes(shape) + plan.kv_bytes(shape, t) + logits + plan.GIB

    memory = plan.DEVICES[device].memory
    assert needs(most + 1) > memory
    assert most == 0 or needs(most) <= memory


def test_max_context_is_zero_when_the_weights_do_not_fit():
    assert plan.max_context(plan.SHAPES["Llama-3.1-8B"], "T4") == 0


def test_decode_reads_every_weight_once():
    tied, untied = plan.SHAPES["SmolLM2-135M"], plan.SHAPES["LLaMA-7B"]
    assert plan.decode_bytes(tied, 0) == plan.weight_bytes(tied)
    assert plan.decode_bytes(untied, 0) == plan.weight_bytes(untied) - 2 * 32000 * 4096
    assert plan.decode_bytes(untied, 100) - plan.decode_bytes(untied, 0) == plan.kv_bytes(untied, 100)


@pytest.mark.parametrize(
    "make",
    [Qwen3Config, lambda: Qwen2Config(use_sliding_window=False), lambda: MistralConfig(sliding_window=None)],
)
def test_other_families_can_be_read(make):
    config = make()
    shape = ModelShape.from_config(config)
    assert (shape.layers, shape.kv_heads) == (config.num_hidden_layers, config.num_key_value_heads)


def test_bad_input_says_what_to_do():
    with pytest.raises(LcxError, match="unknown dtype 'float12': use one of float32"):
        plan.kv_bytes(TINY[0], 1, "float12")
    with pytest.raises(LcxError, match="unknown device 'T5': use one of T4"):
        plan.max_context(TINY[0], "T5")
    with pytest.raises(LcxError, match="use 'mlp' or 'linear'"):
        plan.crossover_length(TINY[0], against="all")
    with pytest.raises(LcxError, match="use a divisor"):
        TINY[0].with_kv_heads(3)
    with pytest.raises(UnsupportedModelError, match="sliding_window = None"):
        ModelShape.from_config(MistralConfig(sliding_window=4096))
    from transformers import GPT2Config

    with pytest.raises(UnsupportedModelError, match="supported are llama"):
        ModelShape.from_config(GPT2Config())


def test_every_setting_of_the_memory_figure_shows_what_the_plan_says():
    from lcx.figures import cost

    shapes = [plan.SHAPES[n] for n in ("SmolLM2-135M", "LLaMA-7B")]
    fig = cost.memory_bars(
        shapes, [1024, 32768], start={"model": "LLaMA-7B", "length": 32768, "dtype": "bfloat16"}
    )
    assert len(fig.frames) == 2 * 2 * 3 * 3
    frame = next(f for f in fig.frames if f.name == "0.1.1.0")  # SmolLM2-135M, 32,768 tokens, MHA, float32
    mha = shapes[0].with_kv_heads(9)
    parts = [plan.weight_bytes(mha, "float32"), plan.kv_bytes(mha, 32768, "float32")]
    assert frame.data[0].x[:2] == pytest.approx([p / plan.GIB for p in parts], rel=1e-3)
    assert fig.data[0].x[1] == 16.0 and fig.data[1].text[1] == "16.0 GiB"  # LLaMA-7B at the start
    assert "524,288 bytes a token" in fig.layout.title.text and "fits: A100-40, H200" in fig.layout.title.text


def test_the_map_of_contexts_writes_no_where_the_weights_do_not_fit():
    from lcx.figures import cost

    fig = cost.max_context_map([plan.SHAPES["Llama-3.1-8B"]], ["T4", "H200"])
    assert [a.text for a in fig.layout.annotations] == [
        "no",
        cost.tokens(plan.max_context(plan.SHAPES["Llama-3.1-8B"], "H200")),
    ]
