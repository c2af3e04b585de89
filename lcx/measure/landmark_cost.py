"""Chapter 7: what landmark attention costs beside plain causal attention and beside the reference's eager formulation.

Time in one process, one after the other; peak memory in a process of its own for each. The eager formulation is written anew
after the reference: a bucket for every query and key, and a softmax by scattering maxima and sums into the buckets.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import measurement
from .focused_cost import _resident
from .focused_scale import need_gpu

HEADS, HEAD_DIM, BLOCK = 8, 64, 64
LENGTH, LENGTHS = 2048, (1024, 2048, 4096, 8192)
THREADS, REPEATS = 2, 7
GPU_LENGTHS, GPU_HEADS, GPU_HEAD_DIMS = (4096, 16384), 32, (64, 128)  # 32 heads of 128 are LLaMA-7B's


@functools.cache
def _bucket_softmax():
    import torch

    class BucketSoftmax(torch.autograd.Function):
        """softmax of x [..., K] among the keys of the same bucket [..., K] of `count`, statistics in float32."""

        @staticmethod
        def forward(ctx, x, bucket, count):
            x = x.float()
            bucket = bucket.expand_as(x)
            most = x.new_full((*x.shape[:-1], count), float("-inf")).scatter_reduce(-1, bucket, x, "amax")
            e = (x - most.gather(-1, bucket)).exp()
            sums = e.new_zeros(most.shape).scatter_add(-1, bucket, e)
            weights = e / sums.gather(-1, bucket)
            ctx.save_for_backward(weights, bucket)
            ctx.count = count
            return weights

        @staticmethod
        def backward(ctx, grad):
            weights, bucket = ctx.saved_tensors
            wg = weights * grad
            sums = wg.new_zeros((*wg.shape[:-1], ctx.count)).scatter_add(-1, bucket, wg)
            return wg - weights * sums.gather(-1, bucket), None, None

    return BucketSoftmax


def scatter_attention(q, k, v, block_size: int):
    """The reference's eager formulation for whole rows: q, k, v [B, H, T, D] -> [B, H, T, D], memory T * T per head."""
    import torch

    T = q.shape[2]
    at = torch.arange(T, device=q.device)
    landmark = at % block_size == block_size - 1
    section = landmark.cumsum(0) - landmark.long()
    own = section[:, None] == section
    visible = (at <= at[:, None]) & ~(own & landmark)
    own &= visible
    last = int(section[-1]) + 1  # the bucket of the own section and of the landmarks of earlier ones
    bucket = torch.where((own | landmark) & visible, last, section)[None, None]
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = _bucket_softmax().apply(scores, bucket, last + 1)
    closing = (section * block_size + block_size - 1).clamp(max=T - 1)  # the landmark of each key's section
    gates = weights.gather(-1, closing.expand_as(weights))
    factor = torch.where(own, 1.0, torch.where(visible[:, closing] & ~landmark, gates, 0.0))
    return (weights * factor).to(q.dtype) @ v


def ours(q, k, v, block_size: int):
    from ..methods.landmark import landmark_attention

    return landmark_attention(q, k, v, block_size)


def sdpa(q, k, v, block_size: int):
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


WAYS: dict[str, Callable] = {"lcx": ours, "scatter": scatter_attention, "sdpa": sdpa}


def inputs(length: int, heads: int = HEADS, head_dim: int = HEAD_DIM, device="cpu", dtype=None):
    """q, k, v, which want gradients, and the gradient of the output, each [1, heads, length, head_dim], by default float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(4)]
    q, k, v, grad = (x.to(device, dtype or torch.float32) for x in made)
    return *(x.requires_grad_() for x in (q, k, v)), grad


def both_ways(way: Callable, q, k, v, grad):
    """Forward and backward: the output and the gradients of q, k and v."""
    import torch

    out = way(q, k, v, BLOCK)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def peak(name: str, length: int) -> float:
    """MiB that forward and backward take beyond what the process held before, in a process of its own."""
    command = [sys.executable, "-m", __name__, name, str(length), str(THREADS)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(json.loads(out.stdout.splitlines()[-1]), 1)


def _difference(mine, theirs) -> float:
    """The largest relative difference among outputs and gradients, in the norm of each."""
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(mine, theirs, strict=True))


@measurement("landmark-cost", model=None, seed=0)
def landmark_cost() -> dict[str, Any]:
    """Landmark attention, forward and backward on two threads of a CPU: time and memory beside SDPA and the eager formulation."""
    import torch

    memory = {name: peak(name, LENGTH) for name in WAYS}
    by_length = [{"tokens": n, "peak_mib": memory["lcx"] if n == LENGTH else peak("lcx", n)} for n in LENGTHS]
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        given, seconds, made = inputs(LENGTH), {name: [] for name in WAYS}, {}
        for _ in range(REPEATS):
            for name, way in WAYS.items():
                start = time.perf_counter()
                made[name] = both_ways(way, *given)
                seconds[name].append(round(time.perf_counter() - start, 4))
    finally:
        torch.set_num_threads(threads)
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "length": LENGTH,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK,
        "threads": THREADS,
        "seconds": seconds,
        "times_sdpa": {name: round(best[name] / best["sdpa"], 2) for name in ("lcx", "scatter")},
        "peak_mib": memory,
        "share_of_scatter_memory": round(memory["lcx"] / memory["scatter"], 4),
        "by_length": by_length,
        "relative_difference": _difference(made["lcx"], made["scatter"]),
    }


def compare_kernels(ways: dict[str, Callable], lengths, head_dims, heads: int, device, dtype, repeats: int):
    """Rows of milliseconds, forward and backward (the median), and peak bytes beyond the inputs (None on a CPU)."""
    import torch

    cuda = torch.device(device).type == "cuda"
    rows = []
    for head_dim in head_dims:
        for length in lengths:
            given, made = inputs(length, heads, head_dim, device, dtype), {}
            for name, way in ways.items():
                for _ in range(3):  # the first call compiles
                    made[name] = both_ways(way, *given)
                times, held = [], torch.cuda.memory_allocated() if cuda else 0
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(repeats):
                    if cuda:
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    both_ways(way, *given)
                    if cuda:
                        torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) * 1e3)
                row = {"way": name, "tokens": length, "head_dim": head_dim, "ms": statistics.median(times)}
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - held if cuda else None
                rows.append(row)
            rows[-len(ways)]["relative_difference"] = _difference(made["kernel"], made["pytorch"])
    return rows


def pytorch_form(q, k, v, block_size: int):
    """`landmark_attention` as it runs where there is no kernel."""
    from ..methods.landmark import _Landmark

    return _Landmark.apply(q, k, v, block_size, q.shape[-1] ** -0.5, None, None)[0]


@measurement("landmark-kernel", model=None, seed=0)
def landmark_kernel() -> dict[str, Any]:
    """The fused kernel, forward and backward in bf16 at 4,096 and 16,384 tokens, beside FlashAttention and the PyTorch form (needs a GPU)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ..kernels.landmark import fused

    need_gpu("landmark-kernel")

    def flash(q, k, v, block_size):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(q, k, v, block_size)

    ways = {"kernel": lambda *x: fused(*x)[0], "flash": flash, "pytorch": pytorch_form}
    rows = compare_kernels(ways, GPU_LENGTHS, GPU_HEAD_DIMS, GPU_HEADS, "cuda", torch.bfloat16, 20)
    ms = {(r["way"], r["tokens"], r["head_dim"]): r["ms"] for r in rows}
    ratios = [
        {"tokens": n, "head_dim": d} | {"times_flash": round(ms["kernel", n, d] / ms["flash", n, d], 2)}
        for n in GPU_LENGTHS
        for d in GPU_HEAD_DIMS
    ]
    return {"block_size": BLOCK, "heads": GPU_HEADS, "dtype": "bfloat16", "rows": rows, "ratios": ratios}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[3]))
    both_ways(WAYS[sys.argv[1]], *inputs(BLOCK * 2))  # what any call needs is not counted
    subject = inputs(int(sys.argv[2]))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    before = _resident("VmRSS")
    both_ways(WAYS[sys.argv[1]], *subject)
    print(_resident("VmHWM") - before)
