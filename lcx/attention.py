"""The seam: how a method takes the place of the attention of single layers of an unmodified transformers model.

transformers rotates keys before its attention function sees them. A memory needs them un-rotated (Focused
Transformer) or rotated late (Landmark Attention), so the method takes over one step earlier: after the projections,
before RoPE. The model's own classes, weights and global tables stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from .errors import LcxError, UnsupportedModelError
from .methods.rope import rope_cos_sin

# Their attention is: project, RMSNorm per head if there is a q_norm, rotate, attend, project.
SUPPORTED = ("Llama", "Mistral", "Qwen2", "Qwen3")


@dataclass(frozen=True)
class Heads:
    """What a layer has computed when the method takes over.

    q [B, H, T, D], k and v [B, Hkv, T, D] before RoPE; cos, sin [B or 1, T, D] of the query positions; scale, what
    scores are multiplied by; cache, the transformers cache or None; layer, its index; extra, keyword arguments that
    came with the call of the model.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    scale: float
    cache: Any
    layer: int
    extra: dict[str, Any]


Method = Callable[[Heads], torch.Tensor]


def causal_lm(model):
    """The transformers model inside wrappers of peft or of data-parallel training.

    Raises UnsupportedModelError unless it is a causal language model of a supported family.
    """
    while hasattr(model, "module"):  # DistributedDataParallel and its kin
        model = model.module
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    if type(model).__name__ not in [f"{family}ForCausalLM" for family in SUPPORTED]:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: use a causal language model of {', '.join(SUPPORTED)}"
        )
    return model


def check_free(model) -> None:
    """Raise LcxError if a method is attached to the model already: two would undo each other's work."""
    modules = [model, *(layer.self_attn for layer in model.model.layers)]
    if any(getattr(vars(module).get("forward"), "of_lcx", False) for module in modules):
        raise LcxError("the model is already inside a method: leave that `with` first")


def in_place_of(forward: Callable, method: Callable) -> Callable:
    """`method` under the name and signature of `forward`, which generate and Trainer look at."""

    @wraps(forward)
    def stand_in(*args, **kwargs):
        return method(*args, **kwargs)

    return stand_in


def rope_tables(model, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, D / 2] of the positions from 0 on, as the model scales them, from angles in float64.

    In the dtype of the model, float32 at least: methods that rotate in two steps must meet those that rotate in one.
    """
    rotary = model.model.rotary_emb
    at = torch.arange(length, device=device)
    dtype = torch.promote_types(model.dtype, torch.float32)
    cos, sin = rope_cos_sin(at, rotary.inv_freq.double())
    return (cos * rotary.attention_scaling).to(dtype), (sin * rotary.attention_scaling).to(dtype)


def project(module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k and v [B, Hkv, T, D] of hidden states x [B, T, hidden], before RoPE."""
    shape = (*x.shape[:-1], -1, module.head_dim)
    q, k, v = (getattr(module, f"{name}_proj")(x).view(shape) for name in "qkv")
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@contextmanager
def replaced(module, forward: Callable) -> Iterator[None]:
    """`module.forward` is `forward` inside the context and what it was before afterwards, whatever happens."""
    before = module.__dict__.get("forward")  # only there if somebody else has replaced it
    forward.of_lcx = True
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def attach(model, methods: Mapping[int, Method]) -> Iterator[None]:
    """Inside the context, the attention of layer i is methods[i]: Heads -> output [B, H, T, D] before o_proj.

    Raises UnsupportedModelError for a model of another family.
    """
    from contextlib import ExitStack

    layers = causal_lm(model).model.layers

    def takes_over(module, method: Method):
        def forward(hidden_states, position_embeddings=None, past_key_values=None, **extra):
            q, k, v = project(module, hidden_states)
            heads = Heads(
                q, k, v, *position_embeddings, module.scaling, past_key_values, module.layer_idx, extra
            )
            out = method(heads).to(hidden_states.dtype).transpose(1, 2)
            return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

        return forward

    with ExitStack() as stack:
        for i, method in methods.items():
            stack.enter_context(replaced(layers[i].self_attn, takes_over(layers[i].self_attn, method)))
        yield
