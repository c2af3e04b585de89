"""Checks of chapter 2, the edge of the window."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from . import exercise


@exercise("02-rope-vector")
def _(answer: Callable) -> None:
    """answer(x [D] float64, position, theta) -> [D], with the pairs of transformers."""
    from ..methods.rope import rope

    g = torch.Generator().manual_seed(0)
    for size, position, theta in (
        (2, 1, 10_000.0),
        (4, 3, 10_000.0),
        (32, 1000, 10_000.0),
        (64, 9000, 100_000.0),
    ):
        x = torch.randn(size, generator=g, dtype=torch.float64)
        y = answer(x.clone(), position, theta)
        assert isinstance(y, torch.Tensor) and y.shape == x.shape, (
            f"return a tensor with the {size} entries of the vector, got {type(y).__name__}"
        )
        where = f"D = {size}, position = {position}, theta = {theta:,.0f}"
        assert torch.isclose(y.norm(), x.norm()), (
            f"a rotation keeps the length of the vector; yours does not ({where})"
        )
        at = torch.tensor([position])
        neighbours = rope(x[None], at, theta, pairs="interleaved")[0]
        assert size == 2 or not torch.allclose(y, neighbours, atol=1e-9), (
            "you paired neighbours, 2j with 2j + 1; transformers pairs j with j + D/2"
        )
        assert not torch.allclose(y, rope(x[None], -at, theta)[0], atol=1e-9), (
            "you turned the other way round"
        )
        assert torch.allclose(y, rope(x[None], at, theta)[0], atol=1e-9), (
            f"not the rotation of RoPE for {where}"
        )


@exercise("02-full-turns")
def _(answer: Callable) -> None:
    """answer(head_dim, theta, window) -> how many pairs turn at least once within the window."""
    for model, args, expected in (
        ("lm-256", (32, 10_000.0, 256), 7),
        ("SmolLM2-135M", (64, 100_000.0, 8192), 20),
        ("Llama 2", (128, 10_000.0, 4096), 46),
        ("Llama 3", (128, 500_000.0, 8192), 35),
    ):
        got = answer(*args)
        assert not isinstance(got, bool) and got == expected, (
            f"for {model} (head_dim, theta, window = {args}) you say {got!r}: "
            f"count the pairs whose wavelength 2 pi / frequency is at most the window"
        )


@exercise("02-restart")
def _(answer: Callable) -> None:
    """answer(model, ids [T], chunk) -> NLL [T-1], reading the text in chunks with a cache."""
    from ..tasks.perplexity import nll_by_position

    model, ids = _tiny()
    expected = nll_by_position(model, ids)
    for chunk in (48, 16, 10):
        got = answer(model, ids, chunk)
        assert isinstance(got, torch.Tensor) and got.shape == expected.shape, (
            f"return one number for each of the {len(expected)} next tokens"
        )
        wrong = (got.float() - expected).abs() > 1e-3
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise AssertionError(
                f"with chunks of {chunk} tokens the result leaves that of one forward at position {first}: "
                "what does the model believe about where that token stands?"
            )


@exercise("02-theta")
def _(answer: Callable) -> None:
    """answer(head_dim, theta, factor) -> the theta that slows the slowest pair by `factor`."""
    from ..methods.rope import rope_frequencies

    for head_dim, theta, factor in ((32, 10_000.0, 4.0), (128, 10_000.0, 8.0), (64, 100_000.0, 2.0)):
        got = answer(head_dim, theta, factor)
        where = f"head_dim = {head_dim}, theta = {theta:,.0f}, factor = {factor:g}"
        assert isinstance(got, int | float) and got > theta, (
            f"theta must become a larger number ({where}), got {got!r}"
        )
        slowed = (rope_frequencies(head_dim, theta)[-1] / rope_frequencies(head_dim, float(got))[-1]).item()
        assert abs(slowed / factor - 1) < 1e-6, (
            f"your theta slows the slowest pair by {slowed:.4g} instead ({where})"
        )


@cache
def _tiny():
    """A random two-layer LLaMA whose answers depend strongly on position, and 48 tokens; leaves the global seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            p.data.mul_(8)
        return model, torch.randint(0, 64, (48,))
