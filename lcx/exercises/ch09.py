"""Checks of chapter 9, Position interpolation."""

import math

import torch

from ..methods.reach import reach, scaled
from ..methods.rope import rope, rope_frequencies
from ..methods.selfextend import selfextend_distances
from . import exercise

MODELS = (
    {"window": 256, "rope_theta": 1e4, "head_dim": 32},
    {"window": 8192, "rope_theta": 1e5, "head_dim": 64},
    {"window": 4096, "rope_theta": 1e4, "head_dim": 128},
)


@exercise("09-reach")
def _(longest_known):
    for sizes in MODELS:
        before = rope_frequencies(sizes["head_dim"], sizes["rope_theta"])
        for method, factor in (("none", 1), ("linear", 2), ("ntk", 8), ("yarn", 8)):
            after = scaled(method, factor, **sizes)[0]
            got, want = longest_known(before, after, sizes["window"]), reach(before, after, sizes["window"])
            assert isinstance(got, int | float), f"return one number, not {type(got).__name__}"
            assert abs(got - want) <= 2, (
                f"window {sizes['window']:,}, {method} at factor {factor}: should be {want:,} tokens, not {got:,.0f}"
            )
    turned = torch.tensor([1.0, 0.5, 0.001], dtype=torch.float64)
    got = longest_known(turned, turned / torch.tensor([1.0, 1.0, 3.0]), 256)
    assert abs(got - 766) <= 2, (
        f"pairs that turned fully set no limit: with two of them unslowed and the third 3 times slower it is 766, not {got:,.0f}"
    )


@exercise("09-ntk-factor")
def _(ntk_factor):
    for sizes in MODELS:
        before = rope_frequencies(sizes["head_dim"], sizes["rope_theta"])
        for times in (2, 4, 8):
            factor = float(ntk_factor(times, **sizes))
            assert factor >= times, (
                f"{factor:.1f} for {times} windows is too small: NTK at factor s reaches less than s windows"
            )
            got = reach(before, scaled("ntk", factor, **sizes)[0], sizes["window"]) / sizes["window"]
            assert abs(got / times - 1) < 0.02, (
                f"window {sizes['window']:,}: your factor {factor:.1f} reaches {got:.2f} windows, not {times}"
            )


@exercise("09-temperature")
def _(yarn_scores):
    sizes = MODELS[0]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 40, 32, generator=generator, dtype=torch.float64)
    for factor in (2, 8):
        frequencies, _ = scaled("yarn", factor, **sizes)
        multiplier = 0.1 * math.log(factor) + 1
        turned = [rope(x, torch.arange(40), frequencies=frequencies) for x in (q, k)]
        plain = turned[0] @ turned[1].T / 32**0.5
        got = yarn_scores(q, k, frequencies, factor)
        assert got.shape == plain.shape, (
            f"return scores of shape {tuple(plain.shape)}, not {tuple(got.shape)}"
        )
        ratio = (got / plain).median().item()
        assert abs(ratio / multiplier**2 - 1) < 1e-6 and torch.allclose(got, plain * multiplier**2), (
            f"factor {factor}: your scores are {ratio:.4f} times those without temperature, YaRN's are {multiplier**2:.4f} times"
        )


@exercise("09-group-size")
def _(smallest_group):
    for length, window, neighbor in (
        (1024, 256, 128), (2048, 256, 128), (257, 256, 128), (256, 256, 64), (512, 64, 16), (16384, 8192, 1024),
        (65536, 8192, 1000),
    ):  # fmt: skip
        got = smallest_group(length, window, neighbor)
        call = f"smallest_group({length}, {window}, {neighbor})"
        assert isinstance(got, int) and got >= 1, f"{call}: return a whole number of at least 1, not {got}"
        assert (got == 1) == (length <= window), (
            f"{call} = {got}: a text that fits needs no groups, a longer one does"
        )
        keys = torch.arange(length)
        most = [selfextend_distances(keys[-1:], keys, g, neighbor).max().item() for g in range(1, got + 1)]
        assert most[-1] < window, (
            f"{call} = {got}: distance {most[-1]} would be shown, the model knows {window - 1}"
        )
        assert all(m >= window for m in most[:-1]), f"{call} = {got}: a smaller group would do"
