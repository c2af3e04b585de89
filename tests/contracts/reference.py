"""A second, slow definition of the models: float64, one query at a time, from the state dict alone.

It shares no code with transformers and none with lcx, so that an error would have to be made twice.
"""

from __future__ import annotations

import math

import torch


def reference_logits(model, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """float64 logits [T, V] of one sequence ids [T] at positions [T] (default 0, 1, 2, …)."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    c = model.config
    positions = torch.arange(len(ids)) if positions is None else positions
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        layer = {
            k.removeprefix(f"model.layers.{i}."): v
            for k, v in w.items()
            if k.startswith(f"model.layers.{i}.")
        }
        x = x + _attention(layer, c, _norm(x, layer["input_layernorm.weight"], c), positions)
        h = _norm(x, layer["post_attention_layernorm.weight"], c)
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = (
            x
            + (gate / (1 + torch.exp(-gate)) * (h @ layer["mlp.up_proj.weight"].T))
            @ layer["mlp.down_proj.weight"].T
        )
    head = w["model.embed_tokens.weight"] if c.tie_word_embeddings else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], c) @ head.T


def _norm(x, weight, c):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps)


def _attention(w, c, x, positions):
    d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def heads(name):
        y = x @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0.0)
        y = y.view(len(x), -1, d)
        scale = w.get(f"self_attn.{name}_norm.weight")
        return y if scale is None else _norm(y, scale, c)

    q, k, v = _rotate(heads("q"), positions, c), _rotate(heads("k"), positions, c), heads("v")
    rows = []
    for t in range(len(x)):
        per_head = []
        for h in range(c.num_attention_heads):
            scores = k[: t + 1, h // group] @ q[t, h] / math.sqrt(d)
            e = torch.exp(scores - scores.max())
            per_head.append((e / e.sum()) @ v[: t + 1, h // group])
        rows.append(torch.cat(per_head))
    return torch.stack(rows) @ w["self_attn.o_proj.weight"].T


def _rotate(x, positions, c):
    """Turn each pair (x_j, x_{j + d/2}) by the angle position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    theta = c.rope_parameters["rope_theta"]
    angle = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
