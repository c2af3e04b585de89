"""One file per zoo model: what it is, what it learns from, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How the copying tasks are trained, beside the learning rate. With a constant rate, no warm-up and the usual adam_beta2 of
# 0.999, needle-64 was still near 0.9 accuracy after 2,950 steps; with these it passes 0.985 in 650.
COPYING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """How to make one zoo model. Everything that decides its weights stands here, and goes into its card.

    config: LlamaConfig fields. training: TrainingArguments fields beyond steps, batch_size and seed.
    tokenizer(): a fresh transformers tokenizer. data(tokenizer, seed, examples): (train, heldout) datasets of
    {"input_ids", "labels"}. score(model, tokenizer): the held-out figures, "loss" in nats per scored token first
    among them. baselines(tokenizer): figures for the card that do not depend on the model. stop_accuracy: stop once
    the held-out accuracy reaches this, looking every eval_steps steps. contexts: step, entries of the batch -> who sees
    whom (lcx.train); then config holds the memory fields of FocusedAttention.of, and items are read in order. With mem_freq in the
    config the model is trained by LandmarkAttention.of. in_order: items are read from start to end.
    """

    name: str
    about: str
    data_about: str
    config: dict[str, Any]
    steps: int
    batch_size: int
    training: dict[str, Any]
    tokenizer: Callable[[], Any]
    data: Callable[[Any, int, int], tuple[Any, Any]]
    score: Callable[[Any, Any], dict[str, Any]]
    baselines: Callable[[Any], dict[str, Any]] | None = None
    stop_accuracy: float | None = None
    contexts: Callable[[int, int], Any] | None = None
    in_order: bool = False
    eval_steps: int = 50
    save_steps: int = 100


def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order in which the book needs them."""
    from . import dictionary, landmark_256, landmark_text, lm_256, needle_64, needle_memory, topic

    return {
        r.name: r
        for r in (
            lm_256.RECIPE,
            *needle_64.RECIPES,
            *topic.RECIPES,
            *needle_memory.RECIPES,
            *dictionary.RECIPES,
            *landmark_256.RECIPES,
            landmark_text.RECIPE,
        )
    }
