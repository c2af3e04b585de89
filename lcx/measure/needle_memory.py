"""Chapter 6: accuracy by the size of a memory, up to 262,144 tokens, for models trained with and without negatives."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..results import write_json
from . import kept, measurement

DOCUMENTS = (1, 4, 16, 64, 256, 1024, 4096)  # first chunks of 64 tokens in the memory
SEEDS = (0, 1, 2)
QUESTIONS = 32  # chunks with questions per memory size; 3 needles of 12 scored tokens each
TOP_K = 32
DATA_SEED = 10**6


def trained(name: str, seed: int):
    """The zoo's model for seed 0, else one trained from the same recipe with that seed, kept in the cache."""
    from .. import zoo
    from ..fetch import cache_dir
    from ..models import load

    if seed == 0:
        return zoo.load(name, device="cpu")[0]
    folder = cache_dir() / "zoo" / f"{name}-seed{seed}"
    if not (folder / "card.json").is_file():
        zoo.train(name, out=folder, seed=seed)
    return load(folder, device="cpu")[0]


def needles(documents: int, generator):
    """input_ids and labels [documents, 2, 64]: three needles in the first chunk, repeated in the second."""
    from ..tasks.needle_copy import needle_chunks
    from ..zoo.recipes.needle_memory import CHUNK, CUE

    return needle_chunks(documents, CHUNK, cue=CUE, generator=generator)


def recall(model, documents: int, make: Callable = needles, answer: int = 12, **settings) -> dict[str, float]:
    """Fill a memory with the first chunks of `documents` unseen documents and ask what their second chunks ask.

    make: (documents, generator) -> input_ids, labels [documents, 2, chunk]. answer: scored tokens in a row, which
    make one answer. settings: changes to FocusedAttention. Small memories are made several times, so that there are
    always 32 chunks of questions.

    Returns the share of scored tokens that are right (each after the true ones before it), the share of answers
    that are right as a whole, how many there were of each, seconds of processor time to fill one memory and to
    answer one chunk, and bytes of the memory.
    """
    import torch

    from ..focused import FocusedAttention

    hits = []
    fill = reply = 0.0
    repeats = max(1, QUESTIONS // documents)
    with FocusedAttention.of(model, **settings)(model) as focused, torch.no_grad():
        for repeat in range(repeats):
            generator = torch.Generator().manual_seed(DATA_SEED + 10_000 * documents + repeat)
            ids, labels = make(documents, generator)
            start = time.process_time()  # not the wall clock: it also counts what else the machine does
            state = focused.remember(ids[:, 0].reshape(1, -1))
            fill += time.process_time() - start
            chosen = torch.linspace(0, documents - 1, min(documents, QUESTIONS)).round().long()
            for some in chosen.split(8):
                start = time.process_time()
                logits = model(ids[some, 1], past_key_values=state.fork()).logits[:, :-1]
                reply += time.process_time() - start
                targets = labels[some, 1, 1:]
                hits.append((logits.argmax(-1) == targets)[targets != -100].view(-1, answer))
    hits = torch.cat(hits)
    return {
        "accuracy": hits.double().mean().item(),
        "whole": hits.all(1).double().mean().item(),
        "scored": hits.numel(),
        "answers": len(hits),
        "fill_seconds": round(fill / repeats, 3),
        "answer_seconds": round(reply / QUESTIONS, 4),
        "memory_bytes": state.memory.nbytes,
    }


def by_size(name: str, models: Sequence[tuple[str, int]], **task) -> dict[str, Any]:
    """`recall` for every (model, seed), size of the memory, and lookup (dense and top-k). Finished rows are kept."""
    file = kept(name)
    rows = json.loads(file.read_text()) if file.is_file() else []
    done = {(r["model"], r["seed"], r["documents"], r["top_k"]) for r in rows}
    for zoo_name, seed in models:
        cells = [(d, k) for d in DOCUMENTS for k in (None, TOP_K) if (zoo_name, seed, d, k) not in done]
        model = trained(zoo_name, seed) if cells else None
        for documents, top_k in cells:
            figures = recall(model, documents, **task, top_k=top_k)
            peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts KiB
            rows.append(
                {"model": zoo_name, "seed": seed, "documents": documents, "tokens": 64 * documents}
                | {"top_k": top_k, **figures, "peak_mib": peak}
            )
            write_json(file, rows)
            print(
                f"{zoo_name} seed {seed}, {64 * documents} tokens, top_k {top_k}: {figures['accuracy']:.3f}"
            )
    rows = [r for r in rows if (r["model"], r["seed"]) in models]
    peak = max(r.pop("peak_mib") for r in rows)
    return {"rows": rows, "top_k": TOP_K, "questions": QUESTIONS, "peak_mib": peak}


@measurement("needle-memory", model=None, seed=0)
def needle_memory() -> dict[str, Any]:
    """Needles found in a memory of up to 262,144 tokens by three models, 3 seeds, dense and top-k."""
    models = [(name, seed) for name in ("needle-memory", "needle-memory-d1") for seed in SEEDS]
    return by_size("needle-memory", [*models, ("needle-memory-plain", 0)])
