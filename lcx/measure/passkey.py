"""Chapter 3 on the real model: passkey by depth and length, recall among distractors, and what perplexity misses.

Every function keeps finished samples in the cache, so an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from . import kept, measurement

SEED = 0
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# length -> samples a cell. The cost grows faster than the length: on two idle cores 0.8 s a prompt at 512 tokens, 35 s
# at 8,192, 70 s at 12,288, so the long ones must do with few. The window of the model is 8,192.
LENGTHS = {512: 4, 1024: 4, 2048: 4, 4096: 2, 8192: 1, 12288: 1}
WINDOW = 8192
HAYSTACKS = ("filler", "prose")
WORDING_LENGTHS = (512, 1024, 2048, 4096)
PER_CELL = 4  # samples a depth in `recall`
RECALL_LENGTH = 512
CONTEXTS = (128, 256, 512, 1024, 2048)


def rows_of(model, name: str) -> Path:
    """Where the finished rows of a grid are kept: a file for each set of weights, device and dtype."""
    what = f"{model.lcx_source} {model.device.type} {model.dtype}"
    return kept(f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}")


@measurement("smollm2-passkey", model="smollm2-135m", seed=SEED)
def passkey_grid(model, tokenizer) -> dict[str, Any]:
    """Passkeys found by SmolLM2-135M by length and depth, in repeated filler and in real prose."""
    from ..evaluate import grid
    from ..tasks import passkey

    rows = []
    for length, n in LENGTHS.items():  # short ones first, so that an early stop leaves a whole small table
        # Past the window the easy haystack is enough to show the fall, and a prompt costs more than a minute.
        for kind in HAYSTACKS if length <= WINDOW else ("filler",):
            file = rows_of(model, f"passkey-{kind}")
            how = {
                "lengths": [length],
                "depths": DEPTHS,
                "n": n,
                "seed": SEED,
                "haystack": kind,
                "partial": file,
            }
            rows += [{**r, "haystack": kind} for r in grid(model, tokenizer, passkey.sample, **how)]
    return {"lengths": list(LENGTHS), "depths": list(DEPTHS), "haystacks": list(HAYSTACKS), "rows": rows}


@measurement("smollm2-wording", model="smollm2-135m", seed=SEED)
def wording(model, tokenizer) -> dict[str, Any]:
    """Passkeys found by SmolLM2-135M when the instruction does not say what to look for."""
    from ..evaluate import grid
    from ..tasks import passkey

    rows = []
    for length in WORDING_LENGTHS:
        for kind in HAYSTACKS:
            how = {"lengths": [length], "depths": DEPTHS, "n": 2, "seed": SEED, "haystack": kind}
            how |= {"instruction": passkey.VAGUE, "partial": rows_of(model, f"wording-{kind}")}
            rows += [{**r, "haystack": kind} for r in grid(model, tokenizer, passkey.sample, **how)]
    return {"instruction": passkey.VAGUE.strip(), "depths": list(DEPTHS), "rows": rows}


@measurement("smollm2-recall", model="smollm2-135m", seed=SEED)
def recall(model, tokenizer) -> dict[str, Any]:
    """SmolLM2-135M where the right number stands among others of its form, and passkeys with the needle taken out."""
    from ..evaluate import grid
    from ..tasks import key_value, lines, needle_grid, passkey

    how = {"depths": DEPTHS, "n": PER_CELL, "seed": SEED}
    counts = (2, 5, 10, 20, 40)
    rows = []
    for name, task, size in (("key-value", key_value, "pairs"), ("lines", lines, "count")):
        part = grid(
            model,
            tokenizer,
            task.sample,
            lengths=counts,
            size=size,
            partial=rows_of(model, f"recall-{name}"),
            **how,
        )
        rows += [{**r, "task": name, "candidates": r["length"], "ablated": False} for r in part]
    how["lengths"] = [RECALL_LENGTH]
    for others in (0, 1, 4, 9):
        file = rows_of(model, f"recall-needle-{others + 1}")
        part = grid(model, tokenizer, needle_grid.sample, distractors=others, partial=file, **how)
        rows += [{**r, "task": "needle", "candidates": others + 1, "ablated": False} for r in part]
    for kind in HAYSTACKS:
        for gone in (False, True):
            file = rows_of(model, f"recall-passkey-{kind}-{gone}")
            part = grid(model, tokenizer, passkey.sample, haystack=kind, ablate=gone, partial=file, **how)
            rows += [{**r, "candidates": 0 if gone else 1, "ablated": gone} for r in part]
    return {"depths": list(DEPTHS), "length": RECALL_LENGTH, "rows": rows}


@measurement("smollm2-context-use", model="smollm2-135m", seed=SEED)
def context_use(model, tokenizer, *, samples: int = 10, scored: int = 64) -> dict[str, Any]:
    """Perplexity and passkeys of SmolLM2-135M on the same prose, cut to its last 128 to 2,048 tokens.

    For each sample: a stretch of prose whose last `scored` tokens are predicted from the C - scored before them, and
    the same place with a passkey hidden at an evenly spread depth. Both are cut from the left to their last C tokens.
    """
    from dataclasses import replace

    import torch

    from ..evaluate import cell_seed, exact_match
    from ..results import write_json
    from ..tasks import passkey
    from ..tasks.perplexity import nll_by_position
    from ..tasks.sample import haystack

    longest = max(CONTEXTS)
    file = rows_of(model, f"context-use-{scored}-{samples}")
    rows = json.loads(file.read_text()) if file.is_file() else []
    for i in range(len(rows) // len(CONTEXTS), samples):
        seed = cell_seed(SEED, "context", i)
        prose = haystack(tokenizer, "prose", longest, random.Random(f"passkey/haystack/{seed}"))
        s = passkey.sample(tokenizer, length=longest, depth=(i + 0.5) / samples, seed=seed, haystack="prose")
        for context in CONTEXTS:
            nll = nll_by_position(model, torch.tensor(prose[-context:]))[-scored:].mean().item()
            [out] = exact_match(model, [replace(s, input_ids=s.input_ids[-context:])])
            row = {
                "sample": i,
                "seed": seed,
                "context": context,
                "nll": round(nll, 5),
                "depth": round(s.depth, 4),
            }
            rows.append({**row, "hit": out.hit, "seen": s.needle[0] >= longest - context})
        write_json(file, rows)
    return {"contexts": list(CONTEXTS), "scored": scored, "length": longest, "rows": rows}
