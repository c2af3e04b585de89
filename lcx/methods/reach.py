"""What a scaled RoPE shows to a model: its frequencies, how far its angles stay known, its scores by distance."""

from __future__ import annotations

import math

import torch

from .rope import rope_cos_sin, rotate, unseen_angle
from .scaling import register_yarn_harmonic, rope_parameters


def scaled(
    method: str, factor: float, *, window: int, rope_theta: float, head_dim: int
) -> tuple[torch.Tensor, float]:
    """What transformers makes of `method` at `factor`: frequencies float64 [head_dim/2] and the multiplier of cos and sin."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    register_yarn_harmonic()
    sizes = {"window": window, "rope_theta": rope_theta, "head_dim": head_dim}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=int(window * factor))
    config.rope_parameters = rope_parameters(method, factor, **sizes)
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def reach(trained: torch.Tensor, now: torch.Tensor, window: int) -> int:
    """Tokens a text may have before any pair meets an angle that training with `window` tokens did not show.

    trained, now: frequencies [D/2] in training and when read. A pair that turned fully in training has no limit, the
    others reach 1 + (window - 1) * trained / now. Raises ValueError if all pairs turned fully: nothing is unseen then.
    """
    unfinished = (window - 1) * trained < 2 * math.pi
    if not unfinished.any():
        raise ValueError("every pair turned fully in training: no angle is unseen, at any length")
    return 1 + math.floor((window - 1) * (trained / now)[unfinished].min().item() + 1e-3)  # float32 rounding


def beyond(distances: torch.Tensor, trained: torch.Tensor, now: torch.Tensor, window: int) -> torch.Tensor:
    """`unseen_angle` for pairs trained at one speed and read at another: [D/2, N] radians outside of the trained arc."""
    slower = trained / now
    return torch.cat(
        [unseen_angle(distances.double() / s, f[None], window) for f, s in zip(trained, slower, strict=True)]
    )


def score_by_distance(
    q: torch.Tensor,
    k: torch.Tensor,
    distances: torch.Tensor,
    frequencies: torch.Tensor,
    multiplier: float = 1.0,
) -> torch.Tensor:
    """Score of one query and one key [D] at each distance [N], divided by sqrt(D). Returns float64 [N].

    multiplier: of cos and sin (YaRN's). The key stands at position 0.
    """
    cos, sin = (multiplier * t for t in rope_cos_sin(distances, frequencies))
    return (rotate(q.double().expand(len(distances), -1), cos, sin) @ k.double()) * multiplier / len(q) ** 0.5
