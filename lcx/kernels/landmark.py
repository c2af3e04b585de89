"""The fused kernel behind `lcx.landmark_attention`: which inputs it takes, how it is launched, its gradients."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import nullcontext

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_BLOCK = 128
LARGEST_TILE = 2**15  # bytes of the keys of a block
TILES = 5  # such tiles the backward pass keeps on the chip


@functools.cache
def _available() -> bool:
    return importlib.util.find_spec("triton") is not None


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> bool:
    """Whether `fused` takes these tensors: one floating-point type of 16 or 32 bits, no mask, no documents, Triton there.

    On a GPU it must also be NVIDIA's, of compute capability 8.0 or later, with room on the chip for the tiles: blocks of up
    to 128 tokens in 16 bits with heads of up to 128. On the CPU the kernel runs only in Triton's interpreter.
    """
    return (
        mask is None
        and documents is None
        and q.dtype in TYPES
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and q.numel() > 0
        and 2 <= block_size <= LARGEST_BLOCK
        and _tile_bytes(q, block_size) <= LARGEST_TILE
        and _available()
        and (not q.is_cuda or _fits(q.device, _tile_bytes(q, block_size)))
    )


@functools.cache
def _fits(device: torch.device, tile: int) -> bool:
    about = torch.cuda.get_device_properties(device)
    return (
        torch.version.hip is None and about.major >= 8 and TILES * tile <= about.shared_memory_per_block_optin
    )


def fused(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`lcx.landmark_attention` with its lse, by one kernel forward and two backward, for inputs that `supports` accepts.

    q [B, H, Q, D], k and v [B, Hkv, K, D], queries the last Q of the K positions. Returns out [B, H, Q, D] in the dtype of q
    and lse float32 [B, H, Q], through which no gradient flows. float32 input is multiplied as
    `torch.set_float32_matmul_precision` says. The gradients are the same from run to run: no atomic additions.
    """
    return _Fused.apply(q, k, v, block_size, q.shape[-1] ** -0.5 if scale is None else scale)


def _pad(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _tile_bytes(q: Tensor, block_size: int) -> int:
    return _pad(block_size) * _pad(q.shape[-1]) * q.element_size()


def _rows(x: Tensor) -> Tensor:
    """With elements of a row side by side, as the kernels read them; any other strides are fine."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """Empty [B, H, T, D] in the memory order of [B, T, H, D], which is what a model goes on with."""
    return x.transpose(1, 2).new_empty(x.transpose(1, 2).shape).transpose(1, 2)


class _Launch:
    """Grids and constants of the kernels for tensors of these shapes."""

    def __init__(self, q: Tensor, k: Tensor, block_size: int, scale: float):
        (B, H, Q, D), (Hkv, K) = q.shape, k.shape[1:3]
        self.heads, self.key_heads = B * H, B * Hkv
        self.queries, self.blocks = Q, -(-K // block_size)
        self.numbers = H, H // Hkv, Q, K, scale
        self.constants = {"B": block_size, "D": D, "N": _pad(block_size), "P": _pad(D)}
        # How float32 is multiplied on tensor cores: three products of tf32 are as good as float32, one is not.
        self.constants["DOT"] = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        # Compiled ahead for sm_80 and sm_90, these tiles fit the chip and keep to the registers but for a few words.
        self.small = q.element_size() == 2 and _tile_bytes(q, block_size) <= 2**14
        self.few = 64 // q.element_size()
        self.device = torch.cuda.device(q.device) if q.is_cuda else nullcontext()

    def options(self, queries: int) -> dict:
        """A tile of `queries` (few where keys fill the chip), and how the compiler spreads it."""
        M = min(queries if self.small else self.few, _pad(self.queries))
        warps = 8 if max(M, self.constants["N"]) * self.constants["P"] > 64 * 64 else 4
        return {**self.constants, "M": M, "num_warps": warps, "num_stages": 2 if self.small else 1}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_size, scale):
        from .landmark_triton import forward

        q, k, v = _rows(q), _rows(k), _rows(v)
        job = _Launch(q, k, block_size, scale)
        out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        strides = (s for x in (q, k, v, out) for s in x.stride()[:3])
        options = job.options(128)
        with job.device:
            grid = (job.heads, -(-job.queries // options["M"]))
            forward[grid](q, k, v, out, lse, *strides, *job.numbers, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = block_size, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        from .landmark_triton import gradient_kv, gradient_q

        q, k, v, out, lse = ctx.saved_tensors
        grad = _rows(grad)
        job = _Launch(q, k, *ctx.settings)
        dq, dk, dv, delta = _like(q), _like(k), _like(k), torch.empty_like(lse)
        options = job.options(64)
        with job.device:
            strides = (s for x in (q, k, v, out, grad, dq) for s in x.stride()[:3])
            grid = (job.heads, -(-job.queries // options["M"]))
            gradient_q[grid](q, k, v, out, lse, grad, dq, delta, *strides, *job.numbers, **options)
            strides = (s for x in (q, k, v, grad, dk) for s in x.stride()[:3])
            grid = (job.key_heads, job.blocks)
            gradient_kv[grid](q, k, v, lse, grad, dk, dv, delta, *strides, *job.numbers, **options)
        return dq, dk, dv, None, None
