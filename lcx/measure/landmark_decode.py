"""Chapter 8: one decoding step over n cached tokens, by fetching blocks and by reading everything."""

from __future__ import annotations

import statistics
import time
from typing import Any

from . import measurement

LENGTHS = (8192, 16384, 32768, 65536, 131072)
HEADS, HEAD_DIM, BLOCK, TOP_K = 32, 128, 64, 4  # one layer of LLaMA-7B, the model of the paper
REPEATS = 40


def filled(tokens: int):
    """(landmark, heads of one new token, dense keys and values): one layer whose cache holds `tokens` random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..attention import Heads
    from ..landmark import LandmarkAttention

    width = HEADS * HEAD_DIM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=32,
            max_position_embeddings=2048,
        )
        model = LlamaForCausalLM(config).eval()
        k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(2))
        heads = Heads(
            *(torch.randn(1, HEADS, 1, HEAD_DIM) for _ in range(3)), None, None, HEAD_DIM**-0.5, None, 0, {}
        )
    with LandmarkAttention(BLOCK, TOP_K, landmark_id=31)(model) as landmark:
        cache = landmark.new_cache()
        cache.open(1, "cpu")
        for start in range(0, tokens, 4096):
            piece = slice(start, start + 4096)
            cache.add({0: (k[:, :, piece], v[:, :, piece])}, torch.tensor([min(4096, tokens - start)]))
    return landmark, cache, heads, (k, v)


def step(landmark, cache, heads):
    """A function that does what the layer does for the first token of a new block. Nothing is added to the cache."""
    from dataclasses import replace

    import torch

    from ..landmark_cache import chunks
    from ..landmark_model import Chunk

    # Made once for all layers of a step.
    (layout,) = chunks(torch.ones(1, 1, dtype=torch.bool), cache.tail_length, BLOCK, landmark.settings.window)
    job = Chunk(layout, cache, layout.length, cache.recent(TOP_K), {}, None)
    heads = replace(heads, extra={"landmark": job})
    return lambda: landmark.attend(heads)


@measurement("landmark-decode", model=None, seed=0)
def landmark_decode() -> dict[str, Any]:
    """Time and bytes of one decoding step over 8k to 128k cached tokens, against dense attention, two threads."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for tokens in LENGTHS:
            landmark, cache, heads, (k, v) = filled(tokens)
            times: dict[str, list[float]] = {"landmark": [], "dense": [], "scoring": []}
            q = heads.q
            keys, attention = cache.landmarks[0], step(landmark, cache, heads)
            with torch.no_grad():
                for _ in range(REPEATS + 3):  # in turn, so that what else the machine does hits all alike
                    start = time.perf_counter()
                    scaled_dot_product_attention(q, k, v)
                    times["dense"].append(time.perf_counter() - start)
                    start = time.perf_counter()
                    q @ keys.mT
                    times["scoring"].append(time.perf_counter() - start)
                    cache.traffic.clear()
                    start = time.perf_counter()
                    attention()
                    times["landmark"].append(time.perf_counter() - start)
            ms = {name: round(1e3 * statistics.median(all_[3:]), 4) for name, all_ in times.items()}
            width = HEADS * HEAD_DIM * 4
            rows.append(
                {"tokens": tokens, "blocks": tokens // BLOCK}
                | {f"{name}_ms": value for name, value in ms.items()}
                | {"ratio": round(ms["dense"] / ms["landmark"], 2)}
                | {"bytes_read": dict(cache.traffic), "bytes": sum(cache.traffic.values())}
                | {
                    "formula_bytes": (tokens // BLOCK + 2 * TOP_K * BLOCK + 2) * width,
                    "dense_bytes": 2 * tokens * width,
                }
            )
            print(f"{tokens} tokens: {rows[-1]}", flush=True)
    finally:
        torch.set_num_threads(threads)
    shape = {"heads": HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK, "top_k": TOP_K, "repeats": REPEATS}
    return {"shape": shape, "rows": rows}
