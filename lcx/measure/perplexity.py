"""Chapter 2 on the real model: what happens to perplexity past the window it was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from . import kept, measurement

CONTROL = 4_096  # tokens a fresh window holds: half the window SmolLM2 was trained with, so well inside it
WIDTH = 512  # positions a bin


@measurement("smollm2-ppl-by-position", model="smollm2-135m")
def by_position(model, tokenizer, *, length: int = 16_384, texts: int = 4) -> dict[str, Any]:
    """Perplexity by position to 16,384 tokens in one forward, and of the same tokens in fresh windows.

    Reads the first `length` tokens of the first `texts` held-out documents of `lcx.text("sotu")`, plain RoPE. Returns
    "plain" and "fresh": mean NLL in nats, [texts][bins]; "plain_std" and "fresh_std", the same shape: standard
    deviation over the tokens of a bin; "counts" [bins]: its tokens. Bin b holds the predictions made at positions
    b * width to (b + 1) * width - 1. Finished texts are kept in the cache.
    """
    from ..corpora import text
    from ..results import write_json

    documents = text("sotu", "heldout")[:texts]
    # What was measured with other weights or on another device must not be mixed in.
    what = f"{model.lcx_source} {model.device.type} {model.dtype} {length} {WIDTH} {CONTROL}"
    file = kept(f"ppl-by-position-{hashlib.sha256(what.encode()).hexdigest()[:12]}")
    done = json.loads(file.read_text()) if file.is_file() else {}
    for document in documents:
        if document.title not in done:
            done[document.title] = one_text(model, tokenizer, document.text, length)
            write_json(file, done)
    rows = [done[d.title] for d in documents]
    return {
        "model": "SmolLM2-135M-Instruct",
        "source": model.lcx_source,
        "texts": [d.title for d in documents],
        "length": length,
        "window": model.config.max_position_embeddings,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "head_dim": model.config.hidden_size // model.config.num_attention_heads,
        "control": {"window": CONTROL, "stride": CONTROL // 2},
        "width": WIDTH,
        "counts": rows[0]["counts"],
        **{key: [row[key] for row in rows] for key in ("plain", "fresh", "plain_std", "fresh_std")},
    }


def one_text(model, tokenizer, content: str, length: int) -> dict[str, list[float]]:
    """The bins of one text, see `by_position`. Raises LcxError if it is shorter than `length` tokens."""
    import torch

    from ..errors import LcxError
    from ..tasks.perplexity import bin_by_position, nll_by_position, nll_sliding

    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:length])
    if len(ids) < length:
        raise LcxError(f"the text has {len(ids)} tokens, {length} are needed: use a smaller length")
    plain = bin_by_position(nll_by_position(model, ids), WIDTH)
    fresh = bin_by_position(nll_sliding(model, ids, CONTROL, CONTROL // 2, batch=1), WIDTH)
    return {
        "counts": [b.count for b in plain],
        "plain": [round(b.mean, 5) for b in plain],
        "fresh": [round(b.mean, 5) for b in fresh],
        "plain_std": [round(b.std, 5) for b in plain],
        "fresh_std": [round(b.std, 5) for b in fresh],
    }
