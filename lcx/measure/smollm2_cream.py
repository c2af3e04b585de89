"""Chapter 10 on a GPU: SmolLM2 taken from 8,192 to 32,768 tokens by CREAM and by PoSE under YaRN, on real text.

It refuses to start without a GPU; the functions behind it run at any size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from . import kept, measurement
from .focused_scale import need_gpu

NAME = "smollm2-cream"
WINDOW, FACTOR, SCALING = 8192, 4, "yarn"
SEEDS = (
    0,
    1,
    2,
)  # of training, the same for both samplers: text in the same order, so that they can be paired
# All weights, as in the paper: with batches of one row and checkpointing that fits a GPU of 16 GB, so LoRA would save nothing
# that is needed. 200 steps x 8 rows x 8,192 tokens are 13 million tokens, six passes over the text and as many as the paper's
# chat model was given.
TRAINING = {"steps": 200, "batch_size": 1, "gradient_accumulation": 8}
TRAINING |= {
    "learning_rate": 2e-5,
    "lr_schedule": "linear",
    "warmup_steps": 10,
}  # the paper's, for the base model
LENGTHS = {  # task -> tokens of a prompt; the small model already fails at key-value recall far inside its window
    "passkey in filler": (4096, 8192, 16384, 32768),
    "passkey in prose": (2048, 4096, 8192, 16384, 32768),
    "key-value": (512, 1024, 2048, 4096, 8192, 16384, 32768),
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 10  # prompts a length and depth, the same for every model
WIDTH = 1024  # positions a bin of the perplexity curve

Keep = Callable[[str], Path]  # name of a part -> the file that keeps it


def cells(
    model, tokenizer, lengths: dict[str, Sequence[int]], depths: Sequence[float], samples: int, keep: Keep
) -> list[dict[str, Any]]:
    """Each task of `lengths` by length and depth: task, length, depth, hits, n, accuracy, Wilson low and high, digits, and
    `right`, the answer digits that are right, prompt by prompt (a hit has all `of`)."""
    from ..evaluate import grid, table
    from ..tasks import key_value, passkey

    sample = {
        "passkey in filler": (passkey.sample, {}),
        "passkey in prose": (passkey.sample, {"haystack": "prose"}),
        "key-value": (key_value.sample, {}),
    }
    out = []
    for task, sizes in lengths.items():
        draw, options = sample[task]
        rows = grid(
            model, tokenizer, draw, lengths=sizes, depths=depths, n=samples, partial=keep(task), **options
        )
        for cell in table(rows, "task", "length", "depth"):
            mine = [r for r in rows if (r["length"], r["depth"]) == (cell["length"], cell["depth"])]
            out.append({**cell, "of": mine[0]["of"], "right": [r["right"] for r in mine]})
    return out


def curves(model, texts: dict[str, Sequence[int]], width: int, keep: Keep) -> list[list[float]]:
    """Mean loss in nats by position, [texts][bins], each text (title -> tokens) read in one forward."""
    import torch

    from ..results import write_json
    from ..tasks.perplexity import bin_by_position, nll_by_position

    file = keep("nll")
    done = json.loads(file.read_text()) if file.is_file() else {}
    for title, ids in texts.items():
        if title not in done:
            bins = bin_by_position(nll_by_position(model, torch.tensor(ids)), width)
            done[title] = [round(b.mean, 5) for b in bins]
            write_json(file, done)
    return [done[title] for title in texts]


def compare(
    plain, tokenizer, tuned: Sequence[tuple[str, int, Path]], texts, *, lengths, depths, samples, width, keep
) -> dict[str, list[dict[str, Any]]]:
    """All figures of the plain model, of the same under zero-shot YaRN, and of the trained checkpoints.

    tuned: (sampler, seed, folder written by finetune). texts: title -> tokens, none seen in training. keep: name -> file of
    a finished part. Returns "cells" (see `cells`) and "nll" (see `curves`), each with model and, where trained, seed.
    """
    from ..methods.scaling import scale_rope
    from ..models import load

    out: dict[str, list[dict[str, Any]]] = {"cells": [], "nll": []}
    untouched = f"{plain.lcx_source} {plain.device.type} {plain.dtype}"
    ways = [("plain", None, None), ("zero-shot", None, None), *tuned]
    for name, seed, folder in ways:
        if folder:
            model, _ = load(folder, device=plain.device.type, dtype=plain.dtype)
            card = json.loads((folder / "card.json").read_text())
            what = json.dumps([card["settings"], card["train_loss"], str(plain.dtype)])
        else:
            model, what = plain, untouched
        about = {"model": name, "seed": seed}
        part = "-".join([name, *([] if seed is None else [str(seed)]), _digest(what)])
        here = partial(_part, keep, part)
        with scale_rope(model, SCALING, FACTOR) if name == "zero-shot" else nullcontext():
            found = cells(model, tokenizer, lengths, depths, samples, here)
            out["cells"] += [about | cell for cell in found]
            out["nll"].append(about | {"nll": curves(model, texts, width, here)})
    return out


def _part(keep: Keep, model: str, what: str) -> Path:
    return keep(f"{model}-{what.replace(' ', '-')}")


def _digest(what: str) -> str:
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def train(model: str, data: tuple[str, ...], samplers, seeds, out: Callable[[str], Path], **training: Any):
    """One checkpoint a sampler and seed: (cards, [(sampler, seed, folder)]). A finished one is not trained again."""
    from ..finetune import finetune
    from ..finetune_cream import CreamSettings

    cards, folders = [], []
    for seed in seeds:
        for sampler in samplers:
            settings = CreamSettings(
                model, data, sampler=sampler, factor=FACTOR, scaling=SCALING, seed=seed, **training
            )
            folders.append((sampler, seed, out(f"{sampler}-{seed}")))
            cards.append(finetune(settings, folders[-1][-1], command=f"lcx measure {NAME}"))
    return cards, folders


@measurement(NAME, model=None, seed=0)
def smollm2_cream() -> dict[str, Any]:
    """SmolLM2-135M from 8,192 to 32,768 tokens by CREAM and PoSE under YaRN: passkeys, key-value recall, loss (needs a GPU)."""
    from ..corpora import text
    from ..models import load

    need_gpu(NAME)

    def keep(part: str) -> Path:
        return kept(f"{NAME}-{part}")

    cards, tuned = train(
        "smollm2-135m",
        ("sotu",),
        ("cream", "pose"),
        SEEDS,
        lambda name: keep(name).with_suffix(""),
        **TRAINING,
        gradient_checkpointing=True,
        bf16=True,
    )
    plain, tokenizer = load("smollm2-135m", device="cuda")
    longest = WINDOW * FACTOR
    ids = {d.title: tokenizer(d.text, verbose=False).input_ids[:longest] for d in text("sotu", "heldout")}
    texts = {title: t for title, t in ids.items() if len(t) == longest}
    figures = compare(
        plain,
        tokenizer,
        tuned,
        texts,
        lengths=LENGTHS,
        depths=DEPTHS,
        samples=SAMPLES,
        width=WIDTH,
        keep=keep,
    )
    return {
        "model": "SmolLM2-135M-Instruct",
        "source": plain.lcx_source,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "window": WINDOW,
        "factor": FACTOR,
        "scaling": SCALING,
        "training": cards,
        "lengths": LENGTHS,
        "depths": DEPTHS,
        "samples": SAMPLES,
        "width": WIDTH,
        "texts": list(texts),
        **figures,
    }
