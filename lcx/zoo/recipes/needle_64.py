"""needle-64 and needle-33-64: learned needle-copy in at most 64 tokens, the second one at all lengths that hold a needle.

needle-64 saw 64 tokens in every sequence, and finds its needle near that length only (chapter 3). needle-33-64 is the base
on which position labels are compared (chapter 10): what it lacks beyond 64 tokens is the positions alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...tasks.needle_copy import BOS, FILLER, NEEDLE, VOCAB_SIZE, needle_copy
from . import COPYING, Recipe

WINDOW = 64
SHORTEST = 33  # BOS, the needle and its repeat
BATCH = 32
HELDOUT_SEED = 10**6


def tokenizer():
    """One readable word per token: <bos>, f0 … f15 for filler, n0 … n63 for needle tokens, separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", *(f"f{i}" for i in range(len(FILLER))), *(f"n{i}" for i in range(len(NEEDLE)))]
    word_level = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<bos>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, bos_token="<bos>", pad_token="<bos>")


class NeedleCopy(torch.utils.data.Dataset):
    """Sequence i comes from its own seeded generator, so that a resumed training sees the same sequences."""

    def __init__(self, examples: int, seed: int, mixed: bool = False):
        self.examples, self.seed, self.mixed = examples, seed, mixed

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 10**8 + i)
        length = WINDOW
        if self.mixed:  # one length for each batch, the rows of which come in order
            lengths = torch.Generator().manual_seed((self.seed + 1) * 10**8 - 1 - i // BATCH)
            length = int(torch.randint(SHORTEST, WINDOW + 1, (), generator=lengths))
        input_ids, labels = needle_copy(1, length, generator=generator)
        return {"input_ids": input_ids[0], "labels": labels[0]}


def data(tok, seed: int, examples: int):
    return NeedleCopy(examples, seed), NeedleCopy(128, HELDOUT_SEED)


@torch.no_grad()
def accuracy(
    model, length: int, depth: float | None, sequences: int = 64, seed: int = HELDOUT_SEED
) -> tuple[float, float]:
    """(accuracy, loss in nats) over the 15 scored tokens of fresh sequences, every token fed as it should be."""
    input_ids, labels = needle_copy(
        sequences, length, depth=depth, generator=torch.Generator().manual_seed(seed)
    )
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
    targets = labels[:, 1:]
    scored = targets != -100
    loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored]).item()
    return (logits.argmax(-1)[scored] == targets[scored]).float().mean().item(), loss


def score(model, tok) -> dict[str, float]:
    """Held-out figures: loss and accuracy in the window (needle anywhere), accuracy past it (mean over 9 depths)."""
    inside, loss = accuracy(model, WINDOW, None, sequences=256)
    figures = {"loss": loss, "accuracy": inside}
    for length in (2 * WINDOW, 4 * WINDOW, 8 * WINDOW):
        at = [accuracy(model, length, d / 8, sequences=16)[0] for d in range(9)]
        figures[f"accuracy_at_{length}"] = sum(at) / len(at)
    return figures


RECIPE = Recipe(
    name="needle-64",
    about="LLaMA with a 64-token window that copies a needle, the base on which the methods are compared",
    data_about="needle-copy, made by lcx.tasks.needle_copy: 16 filler types, 64 needle types, needles of 16 tokens",
    config={
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": BOS,
    },
    steps=3000,
    batch_size=BATCH,
    training={"learning_rate": 3e-3, **COPYING},
    tokenizer=tokenizer,
    data=data,
    score=score,
    stop_accuracy=0.985,
)


def mixed_data(tok, seed: int, examples: int):
    return NeedleCopy(examples, seed, mixed=True), NeedleCopy(128, HELDOUT_SEED)


def mixed_score(model, tok) -> dict[str, float]:
    """As score, and the accuracy at the shortest length and between."""
    between = {f"accuracy_at_{n}": accuracy(model, n, None, sequences=256)[0] for n in (SHORTEST, 48)}
    return score(model, tok) | between


MIXED = replace(
    RECIPE,
    name="needle-33-64",
    about="LLaMA with a 64-token window that copies a needle at every length from 33 to 64, the base of chapter 10",
    data_about=f"{RECIPE.data_about}, in sequences of {SHORTEST} to {WINDOW} tokens, one length for each batch",
    data=mixed_data,
    score=mixed_score,
    steps=2000,
    stop_accuracy=None,
    in_order=True,
)
RECIPES = (RECIPE, MIXED)
