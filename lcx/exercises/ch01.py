"""Checks of chapter 1, what attention costs."""

from __future__ import annotations

from .. import plan
from . import exercise


@exercise("01-kv-bytes")
def _(kv_cache_bytes):
    """kv_cache_bytes(config, length, bytes_per_number) against a real cache of random models."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaForCausalLM

    for name in ("LLaMA-7B", "SmolLM2-135M", "Llama-3.1-8B"):
        config = plan.SHAPES[name].to_config()
        with FakeTensorMode(), torch.no_grad():  # shapes without numbers, so no memory
            cache = LlamaForCausalLM(config)(
                torch.zeros(1, 300, dtype=torch.long), use_cache=True
            ).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        got = kv_cache_bytes(config, 300, 4)
        assert got == held, (
            f"the cache of {name} with 300 tokens in float32 holds {held:,} bytes, you say {got}. {_hint(got, held)}"
        )
        assert kv_cache_bytes(config, 300, 2) == held // 2, (
            "with 2 bytes per number the cache is half as large"
        )


def _hint(got, held) -> str:
    if not isinstance(got, int | float) or not got:
        return "Return a number of bytes."
    if got * 2 == held:
        return "Keys and values are both kept."
    return (
        "Which heads keep keys and values?"
        if got > held
        else "Count layers, heads, numbers per head, tokens."
    )


@exercise("01-decode-crossover")
def _(decode_crossover):
    """decode_crossover(shape): the smallest number of keys at which a decode step's attention costs what its MLP costs."""
    for shape in plan.SHAPES.values():
        got = decode_crossover(shape)
        assert isinstance(got, int), f"return a whole number of keys (int), not {got!r}"
        for keys, enough in ((got, True), (got - 1, False)):
            flops = plan.flops_decode(shape, cached=keys - 1)  # the new token is one of the keys
            assert (flops.attention >= flops.mlp) == enough, (
                f"{shape.name} with {keys:,} keys: attention {flops.attention:,} FLOPs, MLP {flops.mlp:,}. "
                + ("You are too low." if enough else "You are too high: one key fewer is already enough.")
            )


@exercise("01-conversations")
def _(tokens_per_conversation):
    """tokens_per_conversation(shape, memory, batch): the most tokens that each of `batch` conversations may hold."""
    for name, batch, memory in (
        ("LLaMA-7B", 1, 80 * plan.GIB),
        ("LLaMA-7B", 16, 80 * plan.GIB),
        ("Llama-3.1-8B", 16, 80 * plan.GIB),
        ("SmolLM2-135M", 64, 16 * plan.GIB),
        ("LLaMA-7B", 4, 12 * plan.GIB),
    ):
        shape = plan.SHAPES[name]
        got = tokens_per_conversation(shape, memory, batch)
        assert isinstance(got, int), f"return a whole number of tokens (int), not {got!r}"

        def need(tokens, shape=shape, batch=batch):
            return plan.weight_bytes(shape) + plan.kv_bytes(shape, tokens, batch=batch) + plan.GIB

        case = f"{name}, {batch} conversations, {memory / plan.GIB:.0f} GiB"
        if need(0) > memory:
            assert got == 0, (
                f"{case}: the weights and the reserve do not fit, so the answer is 0, you say {got:,}"
            )
            continue
        assert need(got) <= memory, f"{case}: {got:,} tokens each need {need(got) / plan.GIB:.1f} GiB"
        assert need(got + 1) > memory, f"{case}: {got:,} tokens each fit, and so would {got + 1:,}"


@exercise("01-attention-share")
def _(attention_share):
    """attention_share(model, length): counted attention FLOPs over all counted FLOPs of a prefill, logits of one position."""
    import torch
    from transformers import LlamaForCausalLM

    shape = plan.ModelShape("check", 2, 48, 6, 2, 8, 80, 101)
    config = shape.to_config()
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for length in (16, 200):
        got = attention_share(model, length)
        flops = plan.flops_prefill(shape, length, causal=False)
        truth = flops.attention / flops.total
        assert isinstance(got, float), f"return a share (float) between 0 and 1, not {got!r}"
        hint = (
            "The counter does not know the fused kernel: which implementation does it see through?"
            if got == 0
            else ""
        )
        # In older versions of transformers RoPE's angles are a product too. Counting it changes the share by 1e-4.
        assert abs(got - truth) < 2e-4, (
            f"{length} tokens: the share is {truth:.4f}, you say {got:.4f}. {hint}"
        )
    assert model.config._attn_implementation == "sdpa", (
        "put the model's own attention implementation back when you have counted"
    )
