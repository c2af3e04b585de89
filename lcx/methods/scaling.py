"""RoPE scaling on transformers' own `rope_parameters`: the same setting in training, checkpoint and inference.

Linear position interpolation (Chen et al. 2023), NTK-aware and dynamic NTK, YaRN (Peng et al. 2023). Two blends go by
the name of YaRN and differ by up to 2.5x in the middle frequencies: the upstream one ("yarn") and the harmonic one of
the PoSE and CREAM releases ("yarn_harmonic"). A checkpoint trained with one must not be served with the other.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from ..errors import LcxError, UnsupportedModelError

METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "yarn_harmonic")


def rope_parameters(
    method: str, factor: float, *, window: int, rope_theta: float, head_dim: int
) -> dict[str, Any]:
    """What `config.rope_parameters` holds for `method` at `factor` (target length over the pre-trained `window`).

    linear: every angle divided by factor. ntk: rope_theta * factor^(d/(d-2)), so that the fastest frequency stays and
    the slowest is divided by factor. dynamic: ntk with the factor of the current length. yarn, yarn_harmonic: by parts.

    Raises LcxError for an unknown method or a factor below 1.
    """
    if method not in METHODS:
        raise LcxError(f"unknown RoPE scaling {method!r}: use one of {', '.join(METHODS)}")
    if factor < 1:
        raise LcxError(f"factor must be at least 1, got {factor}: it is the target length over the window")
    if method == "none" or (factor == 1 and method != "dynamic"):
        return {"rope_type": "default", "rope_theta": rope_theta}
    if method == "linear":
        return {"rope_type": "linear", "rope_theta": rope_theta, "factor": float(factor)}
    if method == "ntk":
        return {"rope_type": "default", "rope_theta": rope_theta * factor ** (head_dim / (head_dim - 2))}
    if method == "dynamic":  # in transformers `factor` multiplies the growth; 1.0 is the method as published
        return {"rope_type": "dynamic", "rope_theta": rope_theta, "factor": 1.0}
    return {
        "rope_type": method,
        "rope_theta": rope_theta,
        "factor": float(factor),
        "original_max_position_embeddings": window,  # left out, the ramp would silently be computed at the new length
    }


def yarn_harmonic(config, device=None, seq_len=None, layer_type=None):
    """inv_freq [d/2] and the cos/sin multiplier of the PoSE and CREAM releases.

    The ramp is upstream's (linear in the dimension index); the division is (1-m)*factor + m instead of the arithmetic
    mean of the two frequencies. Signature as transformers' ROPE_INIT_FUNCTIONS want it.
    """
    import torch

    p = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base, factor, window = p["rope_theta"], p["factor"], p["original_max_position_embeddings"]

    def index(turns):  # the dimension that makes `turns` turns in the window
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(index(p.get("beta_fast") or 32)), 0)
    high = min(math.ceil(index(p.get("beta_slow") or 1)), dim - 1)
    j = torch.arange(dim // 2, dtype=torch.float64)
    m = 1 - ((j - low) / max(high - low, 1e-3)).clamp(0, 1)
    inv_freq = base ** (-2 * j / dim) / ((1 - m) * factor + m)
    return inv_freq.to(device=device, dtype=torch.float32), 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def register_yarn_harmonic() -> None:
    """Make "yarn_harmonic" a rope_type of transformers in this process (needed to load a checkpoint saved with it)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.setdefault("yarn_harmonic", yarn_harmonic)


class scale_rope:
    """`scale_rope(model, "yarn", factor=8)`: scale now; as a context manager it puts the old RoPE back at the end.

    model: any transformers decoder with one `rotary_emb` (Llama, Mistral, Qwen2, Qwen3). Its config gets the new
    `rope_parameters` and max_position_embeddings = window * factor, so that `save_pretrained` keeps them. Frequencies
    stay float32 when the model is cast to bfloat16 or float16.

    Raises LcxError for bad settings or a model that is already scaled, UnsupportedModelError without a rotary_emb.
    """

    def __init__(self, model, method: str, factor: float = 1.0):
        base = getattr(model, "model", model)
        if not hasattr(base, "rotary_emb"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no RoPE of its own: use Llama, Mistral, Qwen2 or Qwen3"
            )
        config, self._base = model.config, base
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise LcxError(
                f"this model already has {config.rope_parameters['rope_type']} scaling: load the unscaled checkpoint, "
                "or leave the other scale_rope first"
            )
        self._saved = (base.rotary_emb, copy.deepcopy(config.rope_parameters), config.max_position_embeddings)
        window = config.max_position_embeddings
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parameters = rope_parameters(
            method, factor, window=window, rope_theta=config.rope_parameters["rope_theta"], head_dim=head_dim
        )
        if method == "yarn_harmonic":
            register_yarn_harmonic()
        self.model, self.config = model, config
        config.rope_parameters = parameters
        if method != "dynamic":  # dynamic NTK compares the current length with the trained window
            config.max_position_embeddings = int(window * factor)
        device = base.rotary_emb.inv_freq.device
        base.rotary_emb = _keep_float32(type(base.rotary_emb))(config).to(device)

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        self.restore()

    def restore(self) -> None:
        """Put the model's own rotary embedding and config values back; logits are bit-equal to before."""
        self._base.rotary_emb, self.config.rope_parameters, self.config.max_position_embeddings = self._saved


def _keep_float32(cls):
    """The rotary class with frequencies that survive `model.to(torch.bfloat16)`, which would ruin far positions."""

    class Rotary(cls):
        def _apply(self, fn, recurse=True):
            kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            super()._apply(fn, recurse)
            for name, buffer in kept.items():
                self._buffers[name] = buffer.to(self._buffers[name].device)
            return self

    Rotary.__name__ = cls.__name__
    return Rotary
