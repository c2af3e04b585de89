"""Chapter 10: what position labels cost: drawing a batch of them, and a training step that draws its own beside the plain one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import measurement

ROWS, TOKENS, FACTOR = 32, 4096, 8  # the paper's batch and window
DRAWS = 200
STEP_ROWS, STEP_TOKENS, PAIRS = 4, 512, 60
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def samplers(n: int) -> dict[str, Callable]:
    """Name -> sampler of rows of n labels."""
    from ..methods import cream

    return {
        "cream": partial(cream.cream_positions, n, FACTOR),
        "cream-released": partial(cream.cream_positions, n, FACTOR, release=True),
        "pose": partial(cream.pose_positions, n, FACTOR),
        "randpos": partial(cream.randpos_positions, n, FACTOR),
    }


def label_times(draws: int) -> dict[str, list[float]]:
    """Milliseconds of every draw of a whole batch, as PositionLabels draws it: a generator for each row. The samplers take turns."""
    ways, ms = samplers(TOKENS), {name: [] for name in samplers(TOKENS)}
    for i in range(draws):
        for name, draw in ways.items():
            start = time.perf_counter()
            draw([np.random.default_rng([0, i * ROWS + row]) for row in range(ROWS)])
            ms[name].append((time.perf_counter() - start) * 1e3)
    return ms


def step_times(pairs: int) -> dict[str, dict[str, list[float]]]:
    """Clock ("cpu": seconds of computing, "wall") -> way -> seconds of training steps of one model on the same rows, plain and with
    CREAM's labels in turn, now one first, now the other. A step makes its batch, goes forward and backward and updates
    all weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..finetune_cream import PositionLabels, Rows
    from ..train import Documents, collate

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 1024, (STEP_ROWS * STEP_TOKENS * 8 + 1,), generator=generator).tolist()
    data = Rows(Documents([text], STEP_TOKENS, 1), STEP_ROWS, pairs + 1, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=STEP_TOKENS * FACTOR)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labelled = PositionLabels(samplers(STEP_TOKENS)["cream"])
    ways = {
        "plain": lambda items: collate([{k: v for k, v in item.items() if k != "index"} for item in items]),
        "labels": labelled,
    }
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    seconds = {clock: {name: [] for name in ways} for clock in clocks}
    for pair in range(-1, pairs):  # the first pair warms up
        items = [data[(pair + 1) * STEP_ROWS + row] for row in range(STEP_ROWS)]
        for name in sorted(ways, reverse=pair % 2 == 0):
            start = {clock: now() for clock, now in clocks.items()}
            model(**ways[name](items)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for clock, now in clocks.items() if pair >= 0 else ():
                seconds[clock][name].append(now() - start[clock])
    return seconds


@measurement("cream-cost", model=None, seed=0)
def cream_cost() -> dict[str, Any]:
    """Position labels on one thread: milliseconds for a batch of 32 x 4,096, and a training step with them over the plain one."""
    import torch
    from scipy.stats import quantile_test

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        label_times(3)
        ms = label_times(DRAWS)
        seconds = step_times(PAIRS)
    finally:
        torch.set_num_threads(threads)

    def ratio(clock: str) -> dict[str, float]:
        """Of the two steps of a pair: the median and its 95 % interval."""
        x = [a / b for a, b in zip(seconds[clock]["labels"], seconds[clock]["plain"], strict=True)]
        low, high = quantile_test(x, q=1.0, p=0.5).confidence_interval(0.95)
        return {"ratio": round(statistics.median(x), 4), "low": round(low, 4), "high": round(high, 4)}

    return {
        "threads": 1,
        "factor": FACTOR,
        "labels": {
            "rows": ROWS,
            "tokens": TOKENS,
            "draws": DRAWS,
            "ms": {
                name: dict(
                    zip(("low", "median", "high"), np.round(np.quantile(x, (0.1, 0.5, 0.9)), 3), strict=True)
                )
                for name, x in ms.items()
            },
        },
        "step": {
            "rows": STEP_ROWS,
            "tokens": STEP_TOKENS,
            "hidden_size": SHAPE["hidden_size"],
            "layers": SHAPE["num_hidden_layers"],
            "pairs": PAIRS,
            "plain_ms": round(statistics.median(seconds["cpu"]["plain"]) * 1e3, 1),
            "labels_ms": round(statistics.median(seconds["cpu"]["labels"]) * 1e3, 1),
            **ratio("cpu"),  # to this other processes add nothing
            "wall": ratio("wall"),
        },
    }
