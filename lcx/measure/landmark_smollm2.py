"""Chapter 8 on a GPU: SmolLM2 trained with landmarks on real text, against the plain model up to 65,536 tokens.

It refuses to start without a GPU; the functions behind it run at any size.
"""

from __future__ import annotations

import copy
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import kept, measurement
from .focused_scale import LAST, by_length, need_gpu

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # the window of SmolLM2 is 8,192
DENSE = LENGTHS[:5]  # the same weights with all blocks at their true positions: time grows with the square
SAMPLES = 10  # passkeys at each of five depths: 50, as in the paper
TOP_K = 4


def compare(
    plain, tuned, tokenizer, texts, lengths, dense, *, samples: int = SAMPLES, last: int = LAST, partial=None
) -> list[dict[str, Any]]:
    """`by_length` for a model as it is, with landmarks it was not trained on, and trained with landmarks.

    plain, tuned: models of one architecture; tuned and tokenizer come from `lcx train landmark`. The trained model
    retrieves, and reads densely up to the lengths in `dense`. texts, samples, last, partial: see by_length.
    """
    from ..landmark import LandmarkAttention
    from ..landmark_tokens import add_landmark

    settings = LandmarkAttention.of(tuned, top_k=TOP_K, train_length=tuned.config.train_context_length)
    everything = LandmarkAttention.of(tuned, top_k=None)
    untrained = copy.deepcopy(plain)
    add_landmark(untrained, tokenizer)
    ways = {
        "plain": (plain, nullcontext, lengths),
        "landmarks, not trained for them": (untrained, lambda: settings(untrained), lengths),
        "trained with landmarks": (tuned, lambda: settings(tuned), lengths),
        "trained with landmarks, read densely": (tuned, lambda: everything(tuned), dense),
    }
    return by_length(ways, tokenizer, texts, samples=samples, last=last, partial=partial)


@measurement("smollm2-landmark", model=None, seed=0)
def smollm2_landmark() -> dict[str, Any]:
    """SmolLM2-135M trained with landmarks on State of the Union addresses: passkeys and loss by length (needs a GPU)."""
    from ..corpora import text
    from ..finetune import finetune
    from ..finetune_landmark import LandmarkSettings
    from ..models import load

    need_gpu("smollm2-landmark")
    settings = LandmarkSettings(
        "smollm2-135m", ("sotu",), train_length=2048, steps=1000, learning_rate=1e-4, bf16=True
    )
    out = Path(kept("smollm2-landmark")).with_suffix("")
    card = finetune(settings, out, command="lcx measure smollm2-landmark")
    plain, _ = load("smollm2-135m", device="cuda")
    tuned, tokenizer = load(out, device="cuda")
    texts = [tokenizer(d.text, add_special_tokens=False).input_ids for d in text("sotu", "heldout")]
    weights = hashlib.sha256(json.dumps([card["settings"], card["train_loss"]]).encode()).hexdigest()[:12]

    def partial(name: str) -> Path:
        return kept(f"smollm2-landmark-{weights}-{name.replace(' ', '-').replace(',', '')}")

    rows = compare(plain, tuned, tokenizer, texts, LENGTHS, DENSE, partial=partial)
    return {"training": card, "last": LAST, "top_k": TOP_K, "rows": rows}
