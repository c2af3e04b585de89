"""Chapter 9 on the real model: what RoPE scaling without training costs inside the window and saves beyond it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from . import kept, measurement

WIDTH = 512  # positions a bin
METHODS = ("linear", "ntk", "yarn", "dynamic", "yarn_harmonic")


@measurement("smollm2-scaling", model="smollm2-135m")
def by_scaling(
    model, tokenizer, *, length: int = 16_384, texts: int = 2, factor: float = 2.0
) -> dict[str, Any]:
    """Perplexity by position to twice the window under each RoPE scaling, without any training.

    Reads the first `length` tokens of the first `texts` held-out documents of `lcx.text("sotu")`, the texts and bins of
    smollm2-ppl-by-position, where the unscaled model's figures are. Returns "nll" {method: [texts][bins]}: mean NLL in
    nats of the predictions made at positions b * width to (b + 1) * width - 1. All methods but dynamic read the text in
    one forward; see `dynamic` for that one. Every finished text is kept in the cache.
    """
    from ..corpora import text
    from ..results import write_json

    documents = text("sotu", "heldout")[:texts]
    what = f"{model.lcx_source} {model.device.type} {model.dtype} {length} {factor} {WIDTH}"
    file = kept(f"scaling-{hashlib.sha256(what.encode()).hexdigest()[:12]}")
    done = json.loads(file.read_text()) if file.is_file() else {}
    window = model.config.max_position_embeddings
    for method in METHODS:
        for document in documents:
            if (key := f"{method} {document.title}") not in done:
                ids = first_tokens(tokenizer, document.text, length)
                done[key] = one_text(model, ids, method, factor)
                write_json(file, done)
    return {
        "texts": [d.title for d in documents],
        "length": length,
        "window": window,
        "factor": factor,
        "width": WIDTH,
        "dynamic_step": window // 2,
        "nll": {m: [done[f"{m} {d.title}"] for d in documents] for m in METHODS},
    }


def first_tokens(tokenizer, content: str, length: int):
    """int64 [length]. Raises LcxError for a shorter text."""
    import torch

    from ..errors import LcxError

    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:length])
    if len(ids) < length:
        raise LcxError(f"the text has {len(ids)} tokens, {length} are needed: use a smaller length")
    return ids


def one_text(model, ids, method: str, factor: float) -> list[float]:
    """The mean NLL of each bin of WIDTH positions of ids [T], the model scaled by `method`."""
    from ..methods.scaling import scale_rope
    from ..tasks.perplexity import bin_by_position, nll_by_position

    if method == "dynamic":
        nll = dynamic(model, ids)
    else:
        with scale_rope(model, method, factor):
            nll = nll_by_position(model, ids)
    return [round(b.mean, 5) for b in bin_by_position(nll, WIDTH)]


def dynamic(model, ids):
    """NLL [T-1] of ids [T] under dynamic NTK, whose frequencies follow the length read so far.

    One forward over the whole text would use the frequencies of its full length for every position, which is NTK at that
    factor. So the text is read again each time it has grown by half a window, and only the new predictions count.
    """
    import torch

    from ..methods.scaling import scale_rope
    from ..tasks.perplexity import nll_by_position

    window, length = model.config.max_position_embeddings, len(ids)
    ends = [*range(window, length, window // 2), length]
    parts, scored = [], 0
    for end in ends:
        with scale_rope(
            model, "dynamic"
        ):  # anew: transformers keeps the frequencies of the longest text so far
            parts.append(nll_by_position(model, ids[:end])[scored:])
        scored = end - 1
    return torch.cat(parts)
