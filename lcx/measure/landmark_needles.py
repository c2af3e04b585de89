"""Chapter 8: needles found at up to 1,024 times the training length, by retrieval and by everything that is not."""

from __future__ import annotations

import copy
import json
import resource
import time
from typing import Any

from ..evaluate import wilson_interval
from ..results import write_json
from . import kept, measurement
from .needle_memory import trained

SEEDS = (0, 1, 2)
# Tokens of the text, landmarks included, and how many texts there are; each is asked for its four needles.
TEXTS = {256: 64, 512: 64, 1024: 32, 2048: 32, 4096: 16, 8192: 8, 16384: 8, 32768: 8, 65536: 4}
SHORT = 4096  # the longest text for what has failed before
NEEDLES, NEEDLE, CUE = 4, 8, 2
DATA_SEED = 2 * 10**6
TOP_K = (1, 2, 4, 8)
DISK_TOKENS, DISK_TEXTS = 262_144, 4


def texts(count: int, tokens: int, make, first_needle: int):
    """(documents [count, N], their needles [count, 4, 8]): N text tokens that make `tokens` with their landmarks, the repeat included."""
    import torch

    generator = torch.Generator().manual_seed(DATA_SEED + tokens)
    ids, _ = make(count, tokens // 16 * 15, NEEDLE, generator=generator, needles=NEEDLES, cue=CUE)
    documents = ids[:, :-NEEDLE]
    return documents, documents[documents >= first_needle].view(count, NEEDLES, NEEDLE)


def material(name: str):
    """(make, first needle token) of the texts that model `name` was trained on, from text it has not seen."""
    from ..tasks.needle_copy import NEEDLE as TYPES
    from ..tasks.needle_copy import needle_copy
    from ..zoo.recipes import landmark_text

    if name != "landmark-text":
        return needle_copy, TYPES.start
    return landmark_text.maker(landmark_text.tokenizer(), "heldout"), landmark_text.FIRST_NEEDLE


def found(model, documents, needles, mode: str, **settings) -> dict[str, Any]:
    """Ask for every needle of every document: the share of tokens and of whole needles that are right.

    mode: "retrieval" reads a document chunk by chunk and keeps its blocks; "dense" has all blocks at their true
    positions; "window" reads only what fits into a chunk with the question; "plain" is a model without landmarks.
    """
    import torch

    from ..landmark import LandmarkAttention

    right, chosen = [], settings | ({"top_k": None} if mode == "dense" else {})
    start = time.process_time()
    traffic = {}

    def ask(q, **cache):
        logits = model(q, logits_to_keep=NEEDLE, **cache).logits[:, CUE - 1 : -1]
        right.append(logits.argmax(-1) == q[:, CUE - NEEDLE :])

    with torch.no_grad():
        if mode == "plain":
            for document, asked in zip(documents.split(1), needles, strict=True):
                cache = model(document, logits_to_keep=1, use_cache=True).past_key_values
                for needle in asked.split(1):
                    ask(needle, past_key_values=copy.deepcopy(cache))
        else:
            with LandmarkAttention.of(model, **chosen)(model) as landmark:
                s = landmark.settings
                if mode == "window":  # as many whole blocks as a chunk holds, the question among them
                    documents = documents[:, -(s.window // s.block_size * (s.block_size - 1) - NEEDLE) :]
                if mode == "retrieval":
                    state = landmark.remember(documents)
                    filled, traffic = time.process_time() - start, dict(state.traffic)
                    for n in range(NEEDLES):
                        ask(needles[:, n], past_key_values=state.fork())
                else:
                    for n in range(NEEDLES):
                        for row in torch.cat([documents, needles[:, n]], 1).split(8):
                            ask(row, use_cache=False)
    hits = torch.cat(right)
    whole, count = int(hits.all(1).sum()), len(hits)
    low, high = wilson_interval(whole, count)
    figures = {
        "accuracy": hits.double().mean().item(),
        "scored": hits.numel(),
        "whole": whole / count,
        "answers": count,
        "whole_low": low,
        "whole_high": high,
        "seconds": round(time.process_time() - start, 2),
    }
    if mode == "retrieval":
        figures |= {"fill_seconds": round(filled, 2), "bytes_read": traffic, "window": s.window}
        figures["memory_bytes"] = state.memory.nbytes
    return figures


def cells() -> list[tuple[str, int, str, int | None, int]]:
    """(model, seed, mode, top_k, tokens) of every row."""
    rows = []
    for seed in SEEDS:
        rows += [("landmark-256", seed, "retrieval", 4, n) for n in TEXTS if seed == 0 or n <= 32768]
        for mode in ("dense", "window"):
            rows += [("landmark-256", seed, mode, 4, n) for n in TEXTS if n <= SHORT]
    rows += [("landmark-256-plain", 0, "plain", None, n) for n in TEXTS if n <= 32768]
    rows += [("landmark-text", 0, "retrieval", 4, n) for n in TEXTS if n <= 32768]
    rows += [("landmark-text", 0, mode, 4, n) for mode in ("dense", "window") for n in TEXTS if n <= SHORT]
    return rows + [
        ("landmark-256", 0, "retrieval", k, n) for k in TOP_K if k != 4 for n in TEXTS if n <= 16384
    ]


@measurement("landmark-needles", model=None, seed=0)
def landmark_needles() -> dict[str, Any]:
    """Needles found in up to 65,536 tokens by models trained at 256: retrieval, dense, window, plain; 3 seeds."""
    file = kept("landmark-needles")
    rows = json.loads(file.read_text()) if file.is_file() else []
    done = {(r["model"], r["seed"], r["mode"], r["top_k"], r["tokens"]) for r in rows}
    loaded: dict[tuple, Any] = {}
    for cell in cells():
        if cell in done:
            continue
        name, seed, mode, top_k, tokens = cell
        if (name, seed) not in loaded:
            loaded = {(name, seed): (trained(name, seed), *material(name))}
        model, make, first = loaded[name, seed]
        settings = {} if mode == "plain" else {"top_k": top_k}
        figures = found(model, *texts(TEXTS[tokens], tokens, make, first), mode, **settings)
        rows.append(dict(zip(("model", "seed", "mode", "top_k", "tokens"), cell, strict=True)) | figures)
        write_json(file, rows)
        print(
            f"{name} seed {seed} {mode} top_k {top_k}, {tokens} tokens: {figures['accuracy']:.3f}", flush=True
        )
    order = {cell: i for i, cell in enumerate(cells())}
    key = lambda r: order.get((r["model"], r["seed"], r["mode"], r["top_k"], r["tokens"]))  # noqa: E731
    return {"rows": sorted((r for r in rows if key(r) is not None), key=key), "train_tokens": 256}


@measurement("landmark-disk", model="landmark-256", seed=0)
def landmark_disk(model, tokenizer) -> dict[str, Any]:
    """262,144 tokens with all blocks in memory-mapped files: accuracy, peak memory, bytes read, time."""
    make, first = material("landmark-256")
    documents, needles = texts(DISK_TEXTS, DISK_TOKENS, make, first)
    file = kept("landmark-disk")
    rows = json.loads(file.read_text()) if file.is_file() else []
    for i in range(len(rows), DISK_TEXTS):
        row = found(model, documents[i : i + 1], needles[i : i + 1], "retrieval", tier="disk")
        row["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        rows.append({"text": i, "tokens": DISK_TOKENS, **row})
        write_json(file, rows)
        print(f"text {i}: {row['accuracy']:.3f} in {row['seconds']:.0f} s", flush=True)
    whole = sum(round(r["whole"] * r["answers"]) for r in rows)
    low, high = wilson_interval(whole, count := sum(r["answers"] for r in rows))
    return {
        "rows": rows,
        "accuracy": sum(r["accuracy"] for r in rows) / len(rows),
        "whole": whole / count,
        "whole_low": low,
        "whole_high": high,
        "answers": count,
    }
