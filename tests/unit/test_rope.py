"""RoPE against transformers, against its definition by complex numbers, and far away from zero."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lcx.figures.rope import COLORS, edge, phasors, seen_map, unrolled
from lcx.methods.rope import rope, rope_cos_sin, rope_frequencies, rotate, unseen_angle, wavelengths


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_transformers(x, position_ids, theta):
    config = LlamaConfig(
        hidden_size=4 * x.shape[-1],
        num_attention_heads=4,
        head_dim=x.shape[-1],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, position_ids))[0]


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 100, 128])
def test_equals_transformers_in_float32(head_dim, theta):
    x = randn(2, 4, 40, head_dim)
    position_ids = torch.stack(
        [torch.arange(40), torch.arange(40) * 200 + 7]
    )  # up to 7,807, different in each row
    f32 = rope_frequencies(head_dim, theta, dtype=torch.float32)
    torch.testing.assert_close(
        rope(x, position_ids, frequencies=f32), of_transformers(x, position_ids, theta), atol=1e-6, rtol=1e-6
    )
    # The exact angles differ from the float32 ones by the rounding of the position times the frequency.
    torch.testing.assert_close(
        rope(x, position_ids, theta), of_transformers(x, position_ids, theta), atol=8192 * 2e-7 * 4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_rounds_once(dtype):
    x = randn(1, 2, 64, 64, dtype=dtype)
    position_ids = torch.arange(64)[None] + 8000
    y = rope(x, position_ids)
    assert y.dtype == dtype
    exact = rope(x.double(), position_ids)
    ours, theirs = (
        t.double().sub(exact).abs().max() for t in (y, of_transformers(x, position_ids, 10_000.0))
    )
    assert ours <= exact.abs().max() * torch.finfo(dtype).eps
    assert ours < theirs  # transformers multiplies in the low precision itself


def test_accepts_cos_and_sin_of_transformers():
    x, position_ids = randn(2, 3, 9, 64), torch.arange(9)[None].expand(2, 9)
    config = LlamaConfig(hidden_size=192, num_attention_heads=3, rope_parameters={"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10_000.0}, max_position_embeddings=256)  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(x, position_ids)
    assert cos[0, 0, 0] > 1.1  # YaRN's factor is in it
    torch.testing.assert_close(
        rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0], atol=1e-6, rtol=1e-6
    )


def test_interleaved_is_complex_multiplication_and_half_is_its_permutation():
    x, position_ids = randn(2, 3, 11, 20, dtype=torch.float64), torch.arange(11) * 13
    f = rope_frequencies(20)
    turn = torch.polar(torch.ones(11, 10, dtype=torch.float64), position_ids[:, None] * f)
    expected = torch.view_as_real(torch.view_as_complex(x.reshape(2, 3, 11, 10, 2)) * turn).flatten(-2)
    torch.testing.assert_close(rope(x, position_ids, pairs="interleaved"), expected, atol=1e-12, rtol=0)
    order = torch.cat([torch.arange(0, 20, 2), torch.arange(1, 20, 2)])
    torch.testing.assert_close(rope(x[..., order], position_ids), expected[..., order], atol=1e-12, rtol=0)
    assert (rope(x, position_ids) - expected).abs().max() > 0.5


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("shift", [1, 1000, 261_000])
def test_scores_depend_on_the_distance_alone(pairs, shift):
    q, k = randn(64, 1, dtype=torch.float64).T, randn(64, 1, seed=1, dtype=torch.float64).T
    m, n = torch.tensor([700]), torch.tensor([123])

    def score(at):
        return (rope(q, m + at, pairs=pairs) * rope(k, n + at, pairs=pairs)).sum() / 8

    assert abs(score(0) - score(shift)) < (1e-12 if shift <= 1000 else 1e-9)
    assert abs(score(0) - (rope(q, m + 1, pairs=pairs) * rope(k, n, pairs=pairs)).sum() / 8) > 1e-4


def test_norms_and_gradients_are_preserved():
    x = randn(1, 1, 50, 32, dtype=torch.float64).requires_grad_()
    y = rope(x, torch.arange(50) * 997)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_far_away(dtype):
    position = 262_143  # not 2 ** 18: a power of two times a float32 is exact and would hide the loss
    x = torch.zeros(1, 128, dtype=dtype)
    x[0, :64] = 1  # so that the result is cos and sin of each angle
    y = rope(x, torch.tensor([position]), 500_000.0)
    for j in (0, 1, 7, 63):
        angle = position * 500_000.0 ** (-2 * j / 128)  # Python floats: float64
        assert abs(y[0, j] - math.cos(angle)) < torch.finfo(dtype).eps
        assert abs(y[0, 64 + j] - math.sin(angle)) < torch.finfo(dtype).eps
    f32 = rope_frequencies(128, 500_000.0, dtype=torch.float32)
    error = (
        rope_cos_sin(torch.tensor([position]), f32)[0]
        - rope_cos_sin(torch.tensor([position]), f32.double())[0]
    ).abs()
    assert 1e-4 < error.max() < 5e-2  # why float32 angles are not the default


def test_frequencies_and_wavelengths():
    f = rope_frequencies(64, 10_000.0)
    assert f.shape == (32,) and f.dtype == torch.float64 and f[0] == 1
    assert f[-1].item() == pytest.approx(10_000.0 ** (-62 / 64), rel=1e-14)
    assert wavelengths(f)[0].item() == pytest.approx(2 * math.pi)
    assert (f[1:] / f[:-1] - f[1]).abs().max() < 1e-12  # a geometric sequence
    cos, _ = rope_cos_sin(torch.tensor([5]), f.bfloat16())
    assert cos.dtype == torch.float32


def test_unseen_angle_against_a_search_over_all_seen_angles():
    f, window = rope_frequencies(32), 256
    distances = torch.arange(0, 3000, 7)
    gap = unseen_angle(distances, f, window)
    assert gap.shape == (16, len(distances)) and gap.dtype == torch.float64
    assert (gap[:, distances < window] == 0).all()
    slow = wavelengths(f) > window
    assert (gap[~slow] == 0).all() and (gap[slow].max(1).values > 0).all() and gap.max() <= math.pi
    # Brute force: the nearest angle on a fine grid over the seen arc.
    for j in slow.nonzero().flatten().tolist():
        seen = torch.linspace(0, 255, 4000, dtype=torch.float64) * f[j]
        d = (distances[:, None] * f[j] - seen[None]).remainder(2 * math.pi)
        nearest = torch.minimum(d, 2 * math.pi - d).min(1).values
        torch.testing.assert_close(gap[j], nearest, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rope_frequencies(7),
        lambda: rope_frequencies(0),
        lambda: rope_frequencies(8, -1.0),
        lambda: rope_frequencies(8, dtype=torch.bfloat16),
        lambda: rope(torch.zeros(4, 5), torch.arange(4)),
        lambda: rope(torch.zeros(4, 6), torch.arange(4), pairs="other"),
        lambda: rope(torch.zeros(4, 6), torch.arange(3)),
        lambda: rope(torch.zeros(4, 6), torch.arange(4), frequencies=torch.ones(2)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call()


def test_phasors_stand_at_their_angles_and_turn_orange_past_the_seen_arc():
    f, pairs = rope_frequencies(32), [3, 9, 13]
    fig = phasors(f, 256, pairs, [0, 100, 255, 511])
    assert [frame.name for frame in fig.frames] == ["0", "1", "2", "3"] and fig.layout.meta["play"]
    for distance, frame in zip((0, 100, 255, 511), fig.frames, strict=True):
        hands = frame.data[0]
        for r, (j, x, y) in enumerate(zip(pairs, hands.x, hands.y, strict=True), 2):
            assert x == pytest.approx(r * math.cos(distance * f[j].item()), abs=1e-3)
            assert y == pytest.approx(r * math.sin(distance * f[j].item()), abs=1e-3)
    seen, unseen = COLORS[:2]
    assert [list(frame.data[0].marker.color) for frame in fig.frames[2:]] == [
        [seen] * 3,
        [seen, unseen, unseen],
    ]
    assert "2 of 3 hands" in fig.frames[3].layout.title.text


def test_map_shows_the_unseen_angle_in_degrees():
    f = rope_frequencies(32)
    fig = seen_map(f, 256, [256, 1024], start=1024)
    assert all(v == 0 for row in fig.frames[0].data[0].z for v in row)
    z, x = fig.frames[1].data[0].z, fig.frames[1].data[0].x
    assert len(z) == 16 and x[0] == 0 and x[-1] == 1023
    assert z[9][-1] == round(math.degrees(unseen_angle(torch.tensor([1023]), f, 256)[9, 0].item()))
    assert max(z[9]) > 100 and max(z[6]) == 0
    assert fig.data[0].z == z  # starts at 1,024


def test_curves_are_drawn_where_they_belong():
    fig = unrolled(rope_frequencies(64, 100_000.0), 8192, 16384, [18, 31])
    drawn = {(t.name, row): sum(y is not None for y in t.y) for row, t in enumerate(fig.data)}
    assert drawn["past it, an angle never met", 4] == 0 and drawn["past it, an angle never met", 5] > 200
    assert drawn["past it, an angle met before", 2] > 200 and drawn["past it, an angle met before", 3] == 0
    fig = edge(64, 256, {"a": ([10.0, 20.0], [9.0, 18.0], [11.0, 22.0])})
    band, line = fig.data
    assert (
        list(line.x) == [32, 96]
        and list(line.y) == [10, 20]
        and [list(c) for c in line.customdata] == [[9, 11], [18, 22]]
    )
    assert list(band.y) == [11, 22, 18, 9] and fig.layout.yaxis.type == "log"
