"""Will it fit, and how long will it take: bytes and FLOPs of a LLaMA-shaped model, in closed form.

Conventions, the same everywhere in the book:

* One multiply and one add are 2 FLOPs, so an [n, k] @ [k, m] product costs 2 * n * k * m.
* Only matrix products are counted. Norms, RoPE, softmax and activations are left out: they are O(T) or O(T^2) with
  small constants, and `torch.utils.flop_counter.FlopCounterMode` leaves them out too. (Transformers 5.0 makes RoPE's
  angles by a product, batch * T * head_dim FLOPs, which it counts: subtract those of the module `rotary_emb`.)
* Causal attention lets token t see t keys, so T tokens cost T * (T + 1) / 2 query-key pairs, not T^2. A counter that
  looks at shapes sees the full square: ask for `causal=False` to compare with one.
* Bytes are exact; GiB = 2**30 bytes. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import LcxError, UnsupportedModelError

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def itemsize(dtype: Any) -> int:
    """Bytes of one element of `dtype`, a torch dtype or its name ("bfloat16"). Raises LcxError for another name."""
    name = str(dtype).removeprefix("torch.")
    if name not in _BYTES:
        raise LcxError(f"unknown dtype {name!r}: use one of {', '.join(_BYTES)}")
    return _BYTES[name]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide cost. `heads` are query heads, `kv_heads` key-value heads (GQA when fewer).

    tied: the output layer reuses the embedding matrix. Biases and q/k norms, which a few families add, are not
    counted (under 0.1 % of the parameters).
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise LcxError(
                f"{self.name}: {self.heads} heads cannot share {self.kv_heads} key-value heads; use a divisor"
            )

    @classmethod
    def from_config(cls, config: Any, name: str | None = None) -> ModelShape:
        """Read the shape from a transformers config. Raises UnsupportedModelError for another architecture, or for
        sliding-window layers, whose cache stops growing."""
        if config.model_type not in _FAMILIES:
            raise UnsupportedModelError(
                f"cannot plan for model type {config.model_type!r}: supported are {', '.join(_FAMILIES)}"
            )
        if getattr(config, "sliding_window", None):
            raise UnsupportedModelError(
                f"this config has a sliding window of {config.sliding_window}: set config.sliding_window = None to plan full attention"
            )
        heads = config.num_attention_heads
        return cls(
            name=name or getattr(config, "name_or_path", "") or config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    def to_config(self) -> Any:
        """A transformers LlamaConfig of this shape, for a model with random weights (with none in FakeTensorMode)."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
        )

    def with_kv_heads(self, kv_heads: int) -> ModelShape:
        """The same model with another number of key-value heads: `heads` is MHA, 1 is MQA."""
        return replace(self, kv_heads=kv_heads)

    @property
    def projection_params(self) -> int:
        """q, k, v and output projections of one layer: 2 * hidden * head_dim * (heads + kv_heads)."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_params(self) -> int:
        """gate, up and down of one layer: 3 * hidden * intermediate."""
        return 3 * self.hidden * self.intermediate

    @property
    def params(self) -> int:
        """All parameters: layers with their two norms, embedding, final norm, and the output layer unless tied."""
        layer = self.projection_params + self.mlp_params + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward by part, over all layers. `attention` is q k^T and weights times v, nothing else."""

    projections: int
    attention: int
    mlp: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def weight_bytes(shape: ModelShape, dtype: Any = "bfloat16") -> int:
    """params * itemsize."""
    return shape.params * itemsize(dtype)


def kv_bytes(shape: ModelShape, length: int, dtype: Any = "bfloat16", batch: int = 1) -> int:
    """The KV cache of `length` tokens: 2 (k and v) * layers * kv_heads * head_dim * length * batch * itemsize."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * length * batch * itemsize(dtype)


def memory_bytes(
    shape: ModelShape, memory_layers: int, length: int, dtype: Any = "bfloat16", batch: int = 1
) -> int:
    """The memory of a Focused Transformer for `length` tokens: the KV cache of `memory_layers` layers only.

    Raises LcxError if the model has fewer layers.
    """
    if not 0 <= memory_layers <= shape.layers:
        raise LcxError(
            f"{shape.name} has {shape.layers} layers: memory_layers={memory_layers} is not possible"
        )
    return kv_bytes(replace(shape, layers=memory_layers), length, dtype, batch)


def logits_bytes(shape: ModelShape, positions: int = 1, dtype: Any = "bfloat16") -> int:
    """Logits of `positions` tokens: positions * vocab * itemsize. Generation needs 1 position, scoring a text all."""
    return positions * shape.vocab * itemsize(dtype)


def flops_prefill(shape: ModelShape, length: int, *, causal: bool = True, logits: int = 1) -> Flops:
    """One forward over T = `length` tokens, cache empty, with the logits of `logits` positions.

    projections  2 * T * layers * projection_params
    attention    4 * pairs * heads * head_dim * layers
                 pairs = T * (T + 1) / 2 (causal) or T^2 (the full square)
    mlp          2 * T * layers * mlp_params
    logits       2 * logits * hidden * vocab
    """
    pairs = length * (length + 1) // 2 if causal else length * length
    return Flops(
        projections=2 * length * shape.layers * shape.projection_params,
        attention=4 * pairs * shape.heads * shape.head_dim * shape.layers,
        mlp=2 * length * shape.layers * shape.mlp_params,
        logits=2 * logits * shape.hidden * shape.vocab,
    )


def flops_decode(shape: ModelShape, cached: int) -> Flops:
    """One new token after `cached` tokens: as a prefill of 1 token, but attention sees cached + 1 keys."""
    one = flops_prefill(shape, 1)
    return replace(one, attention=one.attention * (cached + 1))


def decode_bytes(shape: ModelShape, cached: int, dtype: Any = "bfloat16") -> int:
    """Bytes one decode step must read at least: every weight once (of the input embedding one row, left out) and the
    KV cache once."""
    read = shape.params - (0 if shape.tied else shape.vocab * shape.hidden)
    return read * itemsize(dtype) + kv_bytes(shape, cached, dtype)


def crossover_length(shape: ModelShape, *, causal: bool = True, against: str = "mlp") -> int:
    """The smallest prefill length T whose attention costs at least as many FLOPs as the MLP (or all linear layers).

    With P parameters per layer on the other side: 2 * T * (T + 1) * heads * head_dim >= 2 * T * P, so
    T* = P / (heads * head_dim) - 1; for the full square T* = P / (2 * heads * head_dim). The MLP has
    P = 3 * hidden * intermediate, so with heads * head_dim = hidden simply T* = 3 * intermediate - 1.

    against: "mlp", or "linear" for projections and MLP together. Raises LcxError for another word.
    """
    params = {"mlp": shape.mlp_params, "linear": shape.projection_params + shape.mlp_params}
    if against not in params:
        raise LcxError(f"crossover_length: against={against!r} is unknown, use 'mlp' or 'linear'")
    width = shape.heads * shape.head_dim
    return -(-params[against] // width) - 1 if causal else -(-params[against] // (2 * width))


@dataclass(frozen=True)
class Device:
    """memory: bytes that torch sees. flops: dense 16-bit peak, FLOP/s. bandwidth: of its memory, bytes/s."""

    name: str
    memory: float
    flops: float
    bandwidth: float


# Peaks and bandwidths: NVIDIA's datasheets (T4 2019, A100 2021, H200 SXM 2024; dense, where the H200's sheet prints
# twice as much "with sparsity"). Memory: what torch.cuda reports in out-of-memory messages, less than on the box.
DEVICES = {
    d.name: d
    for d in (
        Device("T4", 14.56 * GIB, 65e12, 320e9),
        Device("A100-40", 39.4 * GIB, 312e12, 1555e9),
        Device("A100-80", 79.1 * GIB, 312e12, 2039e9),
        Device("H200", 139.7 * GIB, 989.5e12, 4.8e12),
    )
}

# Read from the config files of the published checkpoints, or from LitGPT's table of them (litgpt/config.py);
# SmolLM2-135M from the checkpoint itself. The tests compare the parameter counts with real (weightless) models.
SHAPES = {
    s.name: s
    for s in (
        ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
        ModelShape("SmolLM2-360M", 32, 960, 15, 5, 64, 2560, 49152, tied=True),
        ModelShape("SmolLM2-1.7B", 24, 2048, 32, 32, 64, 8192, 49152, tied=True),
        ModelShape("TinyLlama-1.1B", 22, 2048, 32, 4, 64, 5632, 32000),
        ModelShape("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        ModelShape("OpenLLaMA-3B", 26, 3200, 32, 32, 100, 8640, 32000),  # also LongLLaMA-3B
        ModelShape("LLaMA-7B", 32, 4096, 32, 32, 128, 11008, 32000),  # also Llama-2-7B
        ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    )
}


def max_context(
    shape: ModelShape,
    device: str | Device,
    dtype: Any = "bfloat16",
    *,
    cache_dtype: Any = None,
    all_logits: bool = False,
    reserve: float = GIB,
) -> int:
    """The most tokens of full attention that fit beside the weights, batch 1; 0 when the weights alone do not fit.

    (memory - reserve - weights - logits) / KV bytes per token. `reserve` is for activations and the allocator: enough
    when the prompt is prefilled in chunks and attention never stores its [T, T] scores. all_logits: keep the logits
    of every position in `dtype`. cache_dtype: of the KV cache, `dtype` when None. It is a ceiling of memory and says nothing of quality.

    Raises LcxError for an unknown device name.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise LcxError(f"unknown device {device!r}: use one of {', '.join(DEVICES)} or a plan.Device")
        device = DEVICES[device]
    per_token = kv_bytes(shape, 1, cache_dtype or dtype) + (
        logits_bytes(shape, 1, dtype) if all_logits else 0
    )
    free = (
        device.memory
        - reserve
        - weight_bytes(shape, dtype)
        - (0 if all_logits else logits_bytes(shape, 1, dtype))
    )
    return max(0, int(free // per_token))
