"""Chapter 9 on the real model: what RoPE scaling without training costs inside the window and saves beyond it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from . import kept, measurement

WIDTH = 512  # positions a bin
METHODS = ("linear", "ntk", "yarn")


@measurement("smollm2-scaling", model="smollm2-135m")
def by_scaling(
    model, tokenizer, *, length: int = 16_384, texts: int = 2, factor: float = 2.0
) -> dict[str, Any]:
    """Perplexity by position to twice the window under each RoPE scaling, without any training.

    Reads the first `length` tokens of the first `texts` held-out documents of `lcx.text("sotu")`, each in one forward:
    the texts and bins of smollm2-ppl-by-position, where the unscaled model's figures are. Returns "nll"
    {method: [texts][bins]}: mean NLL in nats of the predictions made at positions b * width to (b + 1) * width - 1.
    Dynamic NTK is not among the methods: a forward of `length` tokens makes it NTK at length / window, and one that fits the
    window the unscaled model. Every finished text is kept in the cache.
    """
    from ..corpora import text
    from ..results import write_json

    documents = text("sotu", "heldout")[:texts]
    what = f"{model.lcx_source} {model.device.type} {model.dtype} {length} {factor} {WIDTH}"
    file = kept(f"scaling-{hashlib.sha256(what.encode()).hexdigest()[:12]}")
    done = json.loads(file.read_text()) if file.is_file() else {}
    for document in documents:
        for method in METHODS:
            if (key := f"{method} {document.title}") not in done:
                ids = first_tokens(tokenizer, document.text, length)
                done[key] = one_text(model, ids, method, factor)
                write_json(file, done)
    return {
        "texts": [d.title for d in documents],
        "length": length,
        "window": model.config.max_position_embeddings,
        "factor": factor,
        "width": WIDTH,
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

    with scale_rope(model, method, factor):
        nll = nll_by_position(model, ids)
    return [round(b.mean, 5) for b in bin_by_position(nll, WIDTH)]
