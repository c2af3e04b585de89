"""A second, slow definition of the models: float64, one query at a time, from the state dict alone.

It shares no code with transformers and none with lcx, so that an error would have to be made twice.
"""

from __future__ import annotations

import math

import torch


def reference_logits(
    model, ids: torch.Tensor, positions: torch.Tensor | None = None, memory: dict[int, list] | None = None
) -> torch.Tensor:
    """float64 logits [T, V] of one sequence ids [T] at positions [T] (default 0, 1, 2, …).

    memory: layer -> un-rotated (key, value) pairs [Hkv, D], one per remembered token; those layers attend to them as well and
    then add their own.
    """
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
        h = _norm(x, layer["input_layernorm.weight"], c)
        x = x + _attention(layer, c, h, positions, None if memory is None else memory.get(i))
        h = _norm(x, layer["post_attention_layernorm.weight"], c)
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = (
            x
            + (gate / (1 + torch.exp(-gate)) * (h @ layer["mlp.up_proj.weight"].T))
            @ layer["mlp.down_proj.weight"].T
        )
    head = w["model.embed_tokens.weight"] if c.tie_word_embeddings else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], c) @ head.T


def reference_windows(model, ids: torch.Tensor, window: int, memory_layers) -> torch.Tensor:
    """Focused Transformer by its definition: windows one after the other, each with positions from 0, and a memory."""
    memory = {i: [] for i in memory_layers}
    return torch.cat([reference_logits(model, part, memory=memory) for part in ids.split(window)])


def _norm(x, weight, c):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps)


def _attention(w, c, x, positions, memory=None):
    d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def heads(name):
        y = x @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0.0)
        y = y.view(len(x), -1, d)
        scale = w.get(f"self_attn.{name}_norm.weight")
        return y if scale is None else _norm(y, scale, c)

    q, raw, v = _rotate(heads("q"), positions, c), heads("k"), heads("v")
    k, past = _rotate(raw, positions, c), list(memory or [])
    rows = []
    for t in range(len(x)):
        per_head = []
        for h in range(c.num_attention_heads):
            kv = h // group
            keys = torch.stack([*[key[kv] for key, _ in past], *k[: t + 1, kv]])
            values = torch.stack([*[value[kv] for _, value in past], *v[: t + 1, kv]])
            scores = keys @ q[t, h] / math.sqrt(d)
            e = torch.exp(scores - scores.max())
            per_head.append((e / e.sum()) @ values)
        rows.append(torch.cat(per_head))
    if memory is not None:
        memory += zip(raw, v, strict=True)
    return torch.stack(rows) @ w["self_attn.o_proj.weight"].T


def _rotate(x, positions, c):
    """Turn each pair (x_j, x_{j + d/2}) by the angle position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    theta = c.rope_parameters["rope_theta"]
    angle = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def landmark_weights(
    scores: torch.Tensor, places: list[int], landmark_of: list[int], own: int
) -> torch.Tensor:
    """Landmark Attention, equations 1 to 4: scores [n] of one query on the keys it may see -> weights [n].

    places: where each key stands in the text. landmark_of: where the landmark of its block stands (p_j; its own place, if it
    is one; beyond the end, if there is none yet). own: the same of the query (p_i). An earlier block whose landmark is not
    among the keys is out of reach. Differentiable.
    """
    groups = []
    for j, p in zip(places, landmark_of, strict=True):
        if p != j:
            groups.append(p)  # regular tokens of one block
        elif p == own:
            groups.append(-1)  # the landmark of the query's block: ignored
        else:
            groups.append(own)  # other landmarks compete with the tokens of the query's block
    inside = {}
    for group in set(groups):
        members = [n for n, g in enumerate(groups) if g == group]
        e = torch.exp(scores[members] - scores[members].max())
        inside.update(zip(members, e / e.sum(), strict=True))
    where, weights = {j: n for n, j in enumerate(places)}, []
    for n, (j, p) in enumerate(zip(places, landmark_of, strict=True)):
        if p == j:
            weights.append(torch.zeros_like(scores[n]))
        elif groups[n] == own:
            weights.append(inside[n])
        else:
            weights.append(inside[n] * (inside[where[p]] if p in where else 0.0))
    return torch.stack(weights)


def landmark_place(j: int, block_size: int) -> int:
    """Where the landmark of the block of place j stands: at its end."""
    return (j // block_size + 1) * block_size - 1
