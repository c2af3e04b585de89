"""Chapter 6: what windowed prefill costs against a direct transcription of the reference's procedure.

Both run the same random LLaMA on the same prompt in the same process, one after the other; peak memory is taken in a process
of its own for each. The transcription follows the released code step by step: memory grown by concatenation, one
softmax over [local, memory] with all scores at once, all layers for every window, logits for every position.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import measurement

LENGTH, WINDOW, LAYERS = 16384, 1024, (2, 4, 6)
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
REPEATS = 2
FULL = (16384, 32768, 65536, 131072, 262144)  # slots in a memory when one more window is added


def random_model():
    """Eight layers, 512 wide, 32,000 tokens: memory layers at a quarter, a half and three quarters of the depth."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, max_position_embeddings=WINDOW)
        return LlamaForCausalLM(config).eval()


def prompt():
    import torch

    return torch.randint(0, 32000, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def ours(model, ids):
    """Prefill by lcx: the logits of the last position [1, vocabulary]."""
    import torch

    from ..focused import FocusedAttention

    with FocusedAttention(LAYERS, window=WINDOW)(model), torch.no_grad():
        return model(ids, logits_to_keep=1).logits[:, -1]


def transcription(model, ids):
    """The released procedure: the logits of all positions, of which the last [1, vocabulary] is returned."""
    import torch

    from ..attention import attach
    from ..methods.rope import rotate

    memory: dict[int, tuple] = {}
    fresh: dict[int, tuple] = {}

    def attention(h):
        q, k = rotate(h.q, h.cos, h.sin), rotate(h.k, h.cos, h.sin)
        past_k, past_v = memory.get(h.layer, (h.k[:, :, :0], h.v[:, :, :0]))
        keys, values = torch.cat([k, past_k], 2), torch.cat([h.v, past_v], 2)
        scores = q @ keys.mT * h.scale
        T = q.shape[2]
        mask = torch.zeros(T, keys.shape[2])
        mask[:, :T] = torch.full((T, T), torch.finfo(scores.dtype).min).triu(1)
        scores = (scores + mask).clamp(min=-1e6)
        fresh[h.layer] = h.k, h.v
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values

    hidden = []
    with attach(model, dict.fromkeys(LAYERS, attention)), torch.no_grad():
        for window in ids.split(WINDOW, dim=1):
            hidden.append(model.model(window, use_cache=False).last_hidden_state)
            for layer, (k, v) in fresh.items():
                past = memory.get(layer, (k[:, :, :0], v[:, :, :0]))
                memory[layer] = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return model.lm_head(torch.cat(hidden, 1))[:, -1]


PROCEDURES = {"lcx": ours, "transcription": transcription}


def _peak(name: str) -> float:
    """MiB above what the process held once the model was there, in a process of its own."""
    out = subprocess.run([sys.executable, "-m", __name__, name], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


@measurement("focused-cost", model=None, seed=0)
def focused_cost() -> dict[str, Any]:
    """Prefill of 16,384 tokens against the reference's procedure, and the cost of adding a window to a full memory."""
    import torch

    peak = {name: _peak(name) for name in PROCEDURES}
    model, ids = random_model(), prompt()
    seconds: dict[str, list[float]] = {name: [] for name in PROCEDURES}
    last = {}
    for _ in range(REPEATS):
        for name, procedure in PROCEDURES.items():
            start = time.perf_counter()
            last[name] = procedure(model, ids)
            seconds[name].append(round(time.perf_counter() - start, 3))
    error = (last["lcx"] - last["transcription"]).norm() / last["transcription"].norm()
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "length": LENGTH,
        "window": WINDOW,
        "memory_layers": LAYERS,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_mib": peak,
        "relative_difference": float(error),
        "times_faster": round(best["transcription"] / best["lcx"], 2),
        "times_less_memory": round(peak["transcription"] / peak["lcx"], 2),
        "append": _append_times(),
    }


def _append_times() -> list[dict[str, Any]]:
    """Milliseconds to add one window to memories of growing size, beside growing by concatenation."""
    import torch

    from ..memory import Memory

    def window():
        return {layer: (torch.ones(1, 8, WINDOW, 64), torch.ones(1, 8, WINDOW, 64)) for layer in LAYERS[:1]}

    rows, memory, new = [], Memory(LAYERS[:1]), window()
    for slots in FULL:
        while len(memory) < slots:
            memory.append(new)
        fork, times = memory.fork(), []
        for _ in range(8):
            start = time.perf_counter()
            fork.append(new)
            times.append(time.perf_counter() - start)
        whole = torch.ones(1, 8, slots, 64)
        start = time.perf_counter()
        for t in new[LAYERS[0]]:
            torch.cat([whole, t], 2)
        joined = time.perf_counter() - start
        rows.append({"slots": slots, "append_ms": sorted(times)[4] * 1e3, "concatenate_ms": joined * 1e3})
    return rows


def _resident(field: str) -> float:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process in MiB; Linux only."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    subject, tokens = random_model(), prompt()
    subject(tokens[:, :8], logits_to_keep=1)  # what any forward needs is not counted
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the model
    before = _resident("VmRSS")
    PROCEDURES[sys.argv[1]](subject, tokens)
    print(_resident("VmHWM") - before)
