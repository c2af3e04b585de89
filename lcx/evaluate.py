"""Scoring: is the answer right, how sure is the percentage, and the depth × length grid of a task.

An answer is scored with one forward. The model reads prompt and true answer together; the answer is an exact match
when at every answer position the largest logit is the true token. That is the same yes or no as greedy decoding:
as long as every token so far was right, both have read the same tokens, and at the first wrong one both fail.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from .errors import LcxError
from .results import write_json
from .tasks import Sample


@dataclass(frozen=True)
class Outcome:
    """hit: the whole answer is right. right: how many of its `of` tokens are, each after the true ones before it."""

    hit: bool
    right: int
    of: int


def exact_match(model, samples: Sequence[Sample], *, batch_tokens: int = 8192) -> list[Outcome]:
    """Greedy exact match of each sample, in their order.

    Samples of one length share a forward, up to `batch_tokens` tokens at a time, so nothing is ever padded. Only
    the logits of the answer positions are computed.
    """
    import torch

    outcomes: list[Outcome | None] = [None] * len(samples)
    by_length: dict[int, list[int]] = {}
    for i, s in enumerate(samples):
        by_length.setdefault(s.length, []).append(i)
    for length, where in by_length.items():
        step = max(1, batch_tokens // length)
        for group in (where[i : i + step] for i in range(0, len(where), step)):
            keep = max(samples[i].answer_length for i in group)
            ids = torch.tensor([samples[i].input_ids for i in group], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids[:, :-1], logits_to_keep=keep, use_cache=False).logits
            same = logits.argmax(-1) == ids[:, -keep:]
            for i, row in zip(group, same, strict=True):
                right = row[keep - samples[i].answer_length :]
                outcomes[i] = Outcome(bool(right.all()), int(right.sum()), len(right))
    return outcomes  # every index was in one group


def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927): (low, high), both in 0 to 1; (0, 1) for n = 0.

    Unlike hits/n ± z·sqrt(p(1-p)/n) it stays inside 0 to 1 and says something useful at 0 and at n hits.
    """
    if not 0 <= hits <= n or not 0 < confidence < 1:
        raise ValueError(f"need 0 <= hits <= n and 0 < confidence < 1, got {hits}, {n}, {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = hits / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n hits the formula gives 0 and 1 up to rounding; say so exactly.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def cell_seed(seed: int, *cell: Any) -> int:
    """A seed for one sample of one cell, so that no two cells of a grid share their numbers."""
    text = "/".join(map(str, (seed, *cell)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def grid(
    model,
    tokenizer,
    sample: Callable[..., Sample],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int | Mapping[int, int],
    seed: int = 0,
    partial: str | Path | None = None,
    batch_tokens: int = 8192,
    size: str = "length",
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure `sample` on every length × depth, n samples a cell (or n[length]). One dict a sample.

    Each row holds task, length, depth (asked for), i, seed (of that sample), answer, hit, right, of. Shorter lengths
    come first. `options` go to `sample`. `size` names the argument of `sample` that a length is given to: a task
    that counts records instead of tokens takes "pairs" or "count".

    partial: a JSON file that keeps finished rows; called again with the same arguments, the grid goes on from there.
    Raises LcxError when that file was made with other arguments.
    """
    from tqdm import tqdm

    from .figures.display import static

    count = {length: n[length] if isinstance(n, Mapping) else n for length in lengths}
    plan = [(x, d, i) for x in sorted(lengths) for d in depths for i in range(count[x])]
    # What a finished row depends on; lengths and n may grow between two calls.
    asked = {
        "sample": f"{sample.__module__}.{sample.__name__}",
        "seed": seed,
        **{k: str(v) for k, v in options.items()},
    }
    rows = _read_partial(partial, asked)
    done = {(r["length"], r["depth"], r["i"]) for r in rows}
    todo = [cell for cell in plan if cell not in done]
    bar = tqdm(total=len(plan), initial=len(plan) - len(todo), disable=static(), unit="prompt", leave=False)
    while todo:
        group = [cell for cell in todo if cell[0] == todo[0][0]]
        seeds = [cell_seed(seed, *cell) for cell in group]
        made = [
            sample(tokenizer, **{size: x}, depth=d, seed=s, **options)
            for (x, d, _), s in zip(group[:64], seeds, strict=False)
        ]
        keep = max(1, batch_tokens // max(s.length for s in made))
        for (x, d, i), s, out in zip(
            group[:keep],
            made[:keep],
            exact_match(model, made[:keep], batch_tokens=batch_tokens),
            strict=False,
        ):
            row = {"task": s.task, "length": x, "depth": d, "i": i, "seed": s.seed, "answer": s.answer}
            rows.append({**row, "hit": out.hit, "right": out.right, "of": out.of})
            todo.remove((x, d, i))
            bar.update()
        if partial is not None:
            write_json(partial, {"asked": asked, "rows": rows})
    bar.close()
    order = {cell: k for k, cell in enumerate(plan)}
    mine = [r for r in rows if (r["length"], r["depth"], r["i"]) in order]
    return sorted(mine, key=lambda r: order[r["length"], r["depth"], r["i"]])


def _read_partial(path: str | Path | None, asked: dict[str, Any]) -> list[dict[str, Any]]:
    if path is None or not Path(path).is_file():
        return []
    kept = json.loads(Path(path).read_text())
    if kept["asked"] != asked:
        raise LcxError(f"{path} holds another measurement ({kept['asked']}): delete it or name another file")
    return kept["rows"]


def table(rows: Iterable[Mapping[str, Any]], *by: str, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Rows of `grid` counted by some of their entries ("length", "depth", "task"): hits, n, accuracy, Wilson interval
    (low, high) and digits, the share of answer tokens that are right. All shares are in 0 to 1."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in by), []).append(r)
    out = []
    for key, members in groups.items():
        hits, n = sum(r["hit"] for r in members), len(members)
        low, high = wilson_interval(hits, n, confidence)
        digits = sum(r["right"] for r in members) / sum(r["of"] for r in members)
        cell = dict(zip(by, key, strict=True))
        out.append(
            {**cell, "hits": hits, "n": n, "accuracy": hits / n, "low": low, "high": high, "digits": digits}
        )
    return out
