"""needle-memory-*: needle-copy across chunks, trained with negatives, without, and without a memory. For a memory of 262,144 tokens."""

from __future__ import annotations

import torch

from ...tasks.needle_copy import BOS, VOCAB_SIZE, needle_chunks
from ...train import Schedule, constant, lanes, stepped
from . import COPYING, Recipe
from .needle_64 import HELDOUT_SEED, tokenizer

CHUNK = 64
DOCUMENTS = 48  # in a batch
MEMORY_LAYER = 2
CUE = 4  # tokens of a repeat that are not scored: with 64 types they tell 15 million needles apart
# From which step on: needles in a document, and the first scored token of a repeat. Three needles at once do not form in
# thousands of steps; one forms in 600, then two, then three.
STAGES = ((0, 1, 2), (750, 2, 2), (1050, 3, 2), (1200, 3, CUE))
TYPES = (16, 24, 32, 64)  # from step 1,200 on, in turn: fewer types make documents more alike
FOCUSED = stepped([(0, 1), (750, 2), (1050, 4), (1200, 16), (1400, 48)])


class Lanes(torch.utils.data.Dataset):
    """Item i is the batch of step i: the first chunks of 48 documents, then their second chunks, [96, 64]."""

    def __init__(self, batches: int, seed: int):
        self.batches, self.seed = batches, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        needles, cue = next((n, cue) for start, n, cue in reversed(STAGES) if i >= start)
        types = TYPES[i % len(TYPES)] if i >= STAGES[-1][0] else TYPES[-1]
        generator = torch.Generator().manual_seed((self.seed + 1) * 10**8 + i)
        rows = needle_chunks(DOCUMENTS, CHUNK, needles, types=types, cue=cue, generator=generator)
        return {
            name: t.transpose(0, 1).flatten(0, 1)
            for name, t in zip(("input_ids", "labels"), rows, strict=True)
        }


def data(tok, seed: int, examples: int):
    return Lanes(examples, seed), None


@torch.no_grad()
def accuracy(model, in_memory: int, questions: int = 48, seed: int = HELDOUT_SEED) -> tuple[float, float]:
    """(accuracy, loss in nats) on the repeats of `questions` unseen documents with `in_memory` first chunks in the memory.

    At most 64 or so: all are in one batch. For more, put them into a memory (lcx measure needle-memory does).
    """
    from ...focused import FocusedAttention
    from ...methods.focused import lane_contexts

    documents = max(questions, in_memory)
    generator = torch.Generator().manual_seed(seed)
    ids, labels = needle_chunks(documents, CHUNK, cue=CUE, generator=generator)
    with FocusedAttention.of(model)(model):
        rows = ids.transpose(0, 1).flatten(0, 1)
        logits = model(rows, contexts=lane_contexts(documents, in_memory)).logits[documents:, :-1]
    targets = labels[:, 1, 1:]
    scored = targets != -100
    loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored]).item()
    return (logits.argmax(-1)[scored] == targets[scored]).float().mean().item(), loss


def score(model, tok) -> dict[str, float]:
    """Held-out loss and accuracy with the own chunk in the memory, accuracy with 8 and with 48 documents in it."""
    own, loss = accuracy(model, 1)
    return {"loss": loss, "accuracy": own} | {f"accuracy_at_{d}": accuracy(model, d)[0] for d in (8, 48)}


def _recipe(name: str, about: str, d: Schedule, steps: int) -> Recipe:
    return Recipe(
        name=name,
        about=f"four-layer LLaMA that copies needles from a memory, {about}",
        data_about="needle-copy across chunks, made by lcx.tasks.needle_copy: 16 filler types, 64 needle types, "
        "1 to 3 needles of 16 tokens in the first of two chunks of 64",
        config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": CHUNK,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # With the usual 0.02 nothing was learned in 1,500 steps: attention scores start out too small to tell keys apart.
            "initializer_range": 0.12,
            "bos_token_id": BOS,
            "eos_token_id": None,
            "pad_token_id": BOS,
            "mem_layers": [MEMORY_LAYER],
            "mem_positionals": True,
            "mem_dtype": "float32",
            "last_context_length": CHUNK,
        },
        steps=steps,
        batch_size=1,
        training={"learning_rate": 3e-3, **COPYING},
        tokenizer=tokenizer,
        data=data,
        score=score,
        contexts=lanes(d),
    )


RECIPES = (
    _recipe("needle-memory", "trained with up to 47 negatives", FOCUSED, 2000),
    _recipe("needle-memory-d1", "trained with its own previous chunk only", constant(1), 2000),
    _recipe("needle-memory-plain", "trained without a memory", constant(0), 300),
)
