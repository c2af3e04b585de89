"""A second, slow definition of the models: float64, one query at a time, from the state dict alone.

It shares no code with transformers and none with lcx, so that an error would have to be made twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def reference_logits(
    model, ids: torch.Tensor, positions: torch.Tensor | None = None, memory: dict[int, list] | None = None
) -> torch.Tensor:
    """float64 logits [T, V] of one sequence ids [T] at positions [T] (default 0, 1, 2, …).

    memory: layer -> un-rotated (key, value) pairs [Hkv, D], one per remembered token; those layers attend to them as well and
    then add their own.
    """
    c, w = model.config, _weights(model)
    positions = torch.arange(len(ids)) if positions is None else positions
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        layer = _layer(w, i)
        h = _norm(x, layer["input_layernorm.weight"], c)
        x = x + _attention(layer, c, h, positions, None if memory is None else memory.get(i))
        x = x + _mlp(layer, c, x)
    return _head(w, c, x)


def reference_windows(model, ids: torch.Tensor, window: int, memory_layers) -> torch.Tensor:
    """Focused Transformer by its definition: windows one after the other, each with positions from 0, and a memory."""
    memory = {i: [] for i in memory_layers}
    return torch.cat([reference_logits(model, part, memory=memory) for part in ids.split(window)])


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().double() for name, p in model.state_dict().items()}


def _layer(w, i):
    prefix = f"model.layers.{i}."
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


def _mlp(w, c, x):
    h = _norm(x, w["post_attention_layernorm.weight"], c)
    gate = h @ w["mlp.gate_proj.weight"].T
    return (gate / (1 + torch.exp(-gate)) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def _head(w, c, x):
    head = w["model.embed_tokens.weight"] if c.tie_word_embeddings else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], c) @ head.T


def _norm(x, weight, c):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps)


def _project(w, c, x, name):
    """Queries, keys or values [T, heads, D] before they are rotated."""
    y = x @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0.0)
    y = y.view(len(x), -1, c.head_dim)
    scale = w.get(f"self_attn.{name}_norm.weight")
    return y if scale is None else _norm(y, scale, c)


def _attention(w, c, x, positions, memory=None):
    d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    q, raw, v = (_project(w, c, x, name) for name in "qkv")
    q = _rotate(q, positions, c)
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


# Landmark Attention with a cache of blocks ---------------------------------------------------------------------------


@dataclass
class Landmarks:
    """How a text is read. window: tokens of a chunk with their landmarks. top_k None: dense, as in training.

    max_blocks: only so many of the newest blocks are kept. base: the position of the first slot. opened: gets, for each
    chunk and layer in turn, {(head, place of the query): places in the text of the blocks it opened}.
    """

    block_size: int
    landmark: int
    top_k: int | None = None
    window: int | None = None
    granularity: str = "head_and_token"
    max_blocks: int | None = None
    base: int = 0
    opened: list | None = None


def with_landmarks(ids: torch.Tensor, block_size: int, landmark: int) -> tuple[torch.Tensor, list[int]]:
    """ids [N] with a landmark after every block_size - 1 of them, and where each of the N stands in the result."""
    text, places = [], []
    for token in ids.tolist():
        places.append(len(text))
        text.append(token)
        if len(text) % block_size == block_size - 1:
            text.append(landmark)
    return torch.tensor(text), places


def reference_landmarks(
    model, ids: torch.Tensor, how: Landmarks, calls: tuple[int, ...] | None = None, everywhere: bool = False
) -> torch.Tensor:
    """float64 logits [N, V] of one sequence ids [N], landmarks put in and their logits taken out (kept if everywhere).

    calls: how many of the N tokens come in each call, default all in one. The first chunk of a call goes on with the block
    that the last call has left unfinished, and counts its tokens as its own.
    """
    c, w, B = model.config, _weights(model), how.block_size
    text, places = with_landmarks(ids, B, how.landmark)
    cuts, known = {0, len(text)}, 0
    for count in calls or (len(ids),) if how.top_k is not None else ():
        start, known = known + known // (B - 1), known + count
        stop = known + known // (B - 1)
        cuts |= {start, *range(start // B * B + how.window, stop, how.window)}
    cuts, past, hidden = sorted(cuts), [([], []) for _ in range(c.num_hidden_layers)], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        x = w["model.embed_tokens.weight"][text[start:stop]]
        for i in range(c.num_hidden_layers):
            layer = _layer(w, i)
            h = _norm(x, layer["input_layernorm.weight"], c)
            x = x + _block_attention(layer, c, h, start, past[i], how)
            x = x + _mlp(layer, c, x)
        hidden.append(x)
    hidden = torch.cat(hidden)
    return _head(w, c, hidden if everywhere else hidden[places])


def _block_attention(w, c, x, start, past, how: Landmarks):
    """One layer over the chunk x [T, hidden] that starts at `start`. past: un-rotated keys and values of all before it.

    Slots 0, 1, … of block_size positions lie one after the other. Of n blocks and k to be fetched, the k newest are scored
    in slots 1 … k and all others in slot 0. The j-th block fetched then stands in slot j, or j + 1 if it is one of the k
    newest, and the local tokens (those since the last landmark, then the chunk) in slot k + 1 and on.
    """
    B, d, group = how.block_size, c.head_dim, c.num_attention_heads // c.num_key_value_heads
    keys, values = past
    complete = start // B
    blocks = list(range(complete))[-how.max_blocks if how.max_blocks else 0 :]
    n = len(blocks)
    k = 0 if how.top_k is None else min(how.top_k, n)

    def slot(s):
        return how.base + s * B

    local = slot(k + 1)
    here = torch.arange(start, start + len(x)) - complete * B + local
    q, new_k, new_v = _rotate(_project(w, c, x, "q"), here, c), _project(w, c, x, "k"), _project(w, c, x, "v")
    scored_at = [slot(0 if i < n - k else i - (n - k) + 1) + B - 1 for i in range(n)]
    scores = torch.zeros(len(x), c.num_attention_heads, n, dtype=torch.float64)
    for i, b in enumerate(blocks):
        key = _rotate(keys[b * B + B - 1][None], torch.tensor(scored_at[i : i + 1]), c)[0]
        for h in range(c.num_attention_heads):
            scores[:, h, i] = q[:, h] @ key[h // group] / math.sqrt(d)
    chosen = _choose(scores, k, how.granularity)
    keys += new_k
    values += new_v
    rows, seen = [], {}
    for t in range(len(x)):
        per_head, place = [], start + t
        for h in range(c.num_attention_heads):
            fetched = chosen[t][h]
            seen[h, place] = [blocks[i] for i in fetched]
            places, positions = [], []
            for rank, i in enumerate(fetched):
                first = slot(rank if i < n - k else rank + 1)
                places += range(blocks[i] * B, blocks[i] * B + B)
                positions += range(first, first + B)
            places += range(complete * B, place + 1)
            positions += range(local, local + place + 1 - complete * B)
            own = torch.stack([keys[j][h // group] for j in places])
            rotated = _rotate(own[:, None], torch.tensor(positions), c)[:, 0]
            weights = landmark_weights(
                rotated @ q[t, h] / math.sqrt(d),
                places,
                [landmark_place(j, B) for j in places],
                landmark_place(place, B),
            )
            per_head.append(weights @ torch.stack([values[j][h // group] for j in places]))
        rows.append(torch.cat(per_head))
    if how.opened is not None:
        how.opened.append(seen)
    return torch.stack(rows) @ w["self_attn.o_proj.weight"].T


def _choose(scores, k, granularity):
    """Which k of n blocks each query fetches: scores [T, H, n] -> lists [T][H] of indices, ascending."""
    T, H, n = scores.shape
    if (
        granularity != "head_and_token"
    ):  # probabilities among the blocks, so that queries or heads can be compared
        scores = scores.log_softmax(-1)
        best = scores.amax(0, keepdim=True) if granularity == "head" else scores.amax(1, keepdim=True)
        scores = best.expand(T, H, n)

    def best_of(row):
        order = sorted(range(n), key=lambda i: (-round(row[i], 9), -i))  # of equals the newest
        return sorted(order[:k])

    return [[best_of(scores[t, h].tolist()) for h in range(H)] for t in range(T)]
