"""Chapter 10: needle-33-64 carried to 8 and 64 times its window by position labels, every arm under one budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ..results import write_json
from . import kept, measurement
from .needle_memory import trained

WINDOW, BATCH, LEARNING_RATE = 64, 32, 1e-3
STEPS = {8: 300, 64: 1000}  # by factor
K = 4  # continuity's head and tail: the released 4 * factor leaves no middle in 64 tokens
DEPTHS = tuple(d / 8 for d in range(9))
SCORED = 15  # tokens of a needle that are scored
DATA_SEED = 3 * 10**6
SEEDS = range(8)


def samplers(
    factor: int, window: int = WINDOW, k: int | None = K
) -> dict[str, Callable[[np.random.Generator], np.ndarray]]:
    """The arms of the comparison: name -> (generator -> labels of one row of `window` tokens). k None: the released 4 * factor."""
    from ..methods import cream

    positions = partial(cream.cream_positions, window, factor, k=k)

    def longrecipe(rng):
        """Sentences of 8 to 24 tokens, the last one cut: needle-copy has none of its own."""
        cuts = np.cumsum(rng.integers(8, 24, size=window // 8, endpoint=True))
        edges = [0, *cuts[cuts < window], window]
        return cream.longrecipe_positions(np.diff(edges), factor, rng)

    return {
        "ordinary": lambda rng: np.arange(window),
        "randpos": partial(cream.randpos_positions, window, factor),
        "pose": partial(cream.pose_positions, window, factor),
        "cream": positions,
        "cream-uniform": partial(positions, sigma=100.0 * factor),  # so wide that the middle is uniform
        "cream-released": partial(positions, release=True),
        "continuity": partial(positions, p_relativity=0.0),
        "relativity": partial(positions, p_relativity=1.0),
        "no-mask": positions,
        "longrecipe": longrecipe,
        "full": lambda rng: np.arange(window * factor),
    }


def train_under(
    model, rows, draw, *, steps: int, batch: int, learning_rate: float, seed: int, mask: bool = True
) -> float:
    """Train `model` in place on `rows` under the labels of `draw` (generator -> int64 [n]). Returns the last loss logged, in nats.

    rows: a dataset of {"input_ids", "labels", "index"}, read in order. mask=False leaves the attention_mask out: the mask trap.
    """
    import tempfile

    import torch
    from transformers import PrinterCallback, TrainingArguments

    from ..finetune_cream import PositionLabels
    from ..models import _no_progress_bars
    from ..train import OrderedTrainer
    from ..zoo.training import kept_random_state

    collator = PositionLabels(draw, seed)

    def without_mask(items):
        return {k: v for k, v in collator(items).items() if k != "attention_mask"}

    model.requires_grad_(True).train()
    with kept_random_state(), _no_progress_bars(), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=10,  # as in the paper's recipe
            adam_beta2=0.98,
            save_strategy="no",
            logging_steps=min(50, steps),
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator if mask else without_mask,
            in_order=True,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log][-1]


def extend(model, arm: str, scaling: str, factor: int = 8, seed: int = 0, steps: int | None = None) -> float:
    """Scale the RoPE of `model` (needle-33-64) and train it in place under the labels of `arm`. Returns the last loss, in nats.

    Rows of 64 tokens, with "full" of 64 * factor; the text depends on the seed alone, so arms of one seed are paired.
    """
    import torch

    from ..methods.scaling import scale_rope
    from ..tasks.needle_copy import needle_copy

    steps = steps or STEPS[factor]
    length = WINDOW * factor if arm == "full" else WINDOW

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return steps * BATCH

        def __getitem__(self, i):
            generator = torch.Generator().manual_seed(DATA_SEED + seed * 10**6 + i)
            ids, labels = needle_copy(1, length, generator=generator)
            return {"input_ids": ids[0], "labels": labels[0], "index": i}

    scale_rope(model, scaling, factor)
    how = {"steps": steps, "batch": BATCH, "learning_rate": LEARNING_RATE, "seed": seed}
    return train_under(model, Rows(), samplers(factor)[arm], **how, mask=arm != "no-mask")


def accuracy(model, lengths: Sequence[int], sequences: int = 32) -> dict[str, list[float]]:
    """Share of scored tokens that are right, by length and by depth of the needle (9 of them). The same sequences for all models."""
    import torch

    from ..tasks.needle_copy import needle_copy

    figures = {}
    for length in lengths:
        row = []
        for depth in DEPTHS:
            generator = torch.Generator().manual_seed(DATA_SEED - 1 - length)
            ids, labels = needle_copy(sequences, length, depth=depth, generator=generator)
            right = []
            with torch.no_grad():
                for part, target in zip(ids.split(8), labels.split(8), strict=True):
                    logits = model(part.to(model.device), use_cache=False, logits_to_keep=SCORED + 1).logits
                    right.append(logits[:, :-1].argmax(-1).cpu() == target[:, -SCORED:])
            row.append(round(torch.cat(right).double().mean().item(), 4))
        figures[str(length)] = row
    return figures


def zero_shot(model, scaling: str, factor: int):
    """The context in which an untrained model is stretched."""
    from ..methods.scaling import scale_rope
    from ..selfextend import SelfExtend

    if scaling == "selfextend":  # the window holds W + (L - W) / G distances: 16 + 496 / 16 = 47 of 64
        return SelfExtend(group_size=2 * factor, neighbor_window=WINDOW // 4)(model)
    return nullcontext() if scaling == "none" else scale_rope(model, scaling, factor)


def t_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """mean, low and high of Student's interval over independent seeds; with one seed the ends are None."""
    from scipy import stats

    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": n}
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / n**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": n}


def summary(rows: list[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """means: of each arm, by length, over depths, with an interval over seeds. paired: a - b of the same seed, over all depths and over
    the middle third."""
    arms: dict[tuple[str, str], dict[int, dict]] = {}
    for r in rows:
        arms.setdefault((r["arm"], r["scaling"]), {})[r["seed"]] = r["accuracy"]
    means, paired = [], []
    for (arm, scaling), by_seed in arms.items():
        for length in next(iter(by_seed.values())):
            values = [float(np.mean(a[length])) for a in by_seed.values()]
            means.append({"arm": arm, "scaling": scaling, "length": int(length), **t_interval(values)})
    for (a, b), scaling in product(pairs, dict.fromkeys(s for _, s in arms)):
        if (a, scaling) not in arms or (b, scaling) not in arms:
            continue
        one, other = arms[a, scaling], arms[b, scaling]
        seeds = sorted(one.keys() & other.keys())
        for length, (depths, part) in product(
            one[seeds[0]], {"all": slice(0, 9), "middle": slice(3, 6)}.items()
        ):
            d = [float(np.mean(one[s][length][part]) - np.mean(other[s][length][part])) for s in seeds]
            where = {"scaling": scaling, "a": a, "b": b, "length": int(length), "depths": depths}
            paired.append(where | t_interval(d) | {"wins": sum(x > 0 for x in d)})
    return {"means": means, "paired": paired}


def rows_of_cells(
    name: str,
    cells: Sequence[tuple[str, str, int]],
    run: Callable[[str, str, int], tuple[dict[str, Any], str]],
) -> list[dict[str, Any]]:
    """Every cell (arm, scaling, seed) once, in order; finished ones come from the cache.

    run: cell -> (the figures of its row, what to print of them).
    """
    file = kept(name)
    rows = json.loads(file.read_text()) if file.is_file() else []
    done = {(r["arm"], r["scaling"], r["seed"]): r for r in rows}
    for cell in cells:
        if cell in done:
            continue
        before = time.process_time()
        figures, words = run(*cell)
        row = dict(zip(("arm", "scaling", "seed"), cell, strict=True)) | figures
        done[cell] = row | {"seconds": round(time.process_time() - before, 1)}
        rows.append(done[cell])
        write_json(file, rows)
        print(f"{cell[0]} {cell[1]} seed {cell[2]}: {words} in {rows[-1]['seconds']} s", flush=True)
    return [done[cell] for cell in cells]


def measure(name: str, cells, factor: int, lengths: Sequence[int], sequences: int, pairs) -> dict[str, Any]:
    """The result `name`: needles found under each cell, summed up."""

    def run(arm: str, scaling: str, seed: int):
        model, row = trained("needle-33-64", seed), {}
        if arm == "zero-shot":
            with zero_shot(model, scaling, factor):
                row["accuracy"] = accuracy(model, lengths, sequences)
        else:
            row["last_loss"] = extend(model, arm, scaling, factor, seed)
            row["accuracy"] = accuracy(model, lengths, sequences)
        return row, " ".join(f"{n}:{np.mean(a):.2f}" for n, a in row["accuracy"].items())

    rows = rows_of_cells(name, cells, run)
    about = {
        "window": WINDOW,
        "factor": factor,
        "steps": STEPS[factor],
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "k": K,
        "depths": DEPTHS,
        "scored": sequences * SCORED,
    }
    return about | summary(rows, pairs) | {"rows": rows}


PAIRS = (
    ("cream", "pose"),
    ("cream", "cream-uniform"),
    ("cream-uniform", "pose"),
    ("cream", "continuity"),
    ("cream", "relativity"),
    ("cream", "longrecipe"),
)


@measurement("cream-needles", model=None, seed=0)
def cream_needles() -> dict[str, Any]:
    """Accuracy by depth up to 8 times the window: PI-only, RandPos, PoSE, CREAM and its ablations, paired over 8 seeds."""
    untrained = [
        ("zero-shot", s, seed) for seed in SEEDS for s in ("none", "linear", "ntk", "yarn", "selfextend")
    ]
    main = ("pose", "cream", "cream-uniform", "ordinary", "randpos")
    ablations = ("continuity", "relativity", "no-mask", "longrecipe")
    cells = untrained + [(arm, s, seed) for s in ("yarn", "linear") for seed in SEEDS for arm in main]
    cells += [(arm, s, seed) for seed in range(4) for arm in ablations for s in ("linear", "yarn")]
    cells += [("full", s, 0) for s in ("linear", "yarn")]
    return measure("cream-needles", cells, 8, (64, 128, 256, 512), 32, PAIRS)


@measurement("cream-64x", model=None, seed=0)
def cream_64x() -> dict[str, Any]:
    """Accuracy by depth up to 64 times the window: a sigma that covers it, the released one, a uniform middle, PoSE."""
    arms = ("cream", "cream-released", "cream-uniform", "pose")
    cells = [(arm, "yarn", seed) for seed in SEEDS for arm in arms]
    cells += [(arm, "yarn", seed) for seed in range(3) for arm in ("zero-shot", "ordinary", "randpos")]
    pairs = (("cream", "cream-released"), ("cream", "cream-uniform"), ("cream", "pose"))
    return measure("cream-64x", cells, 64, (64, 256, 512, 1024, 2048, 4096), 8, pairs)
