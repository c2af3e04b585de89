"""topic-*: four tiny models on the topic task, alike but for who sees whom in training. For the distraction issue."""

from __future__ import annotations

import torch

from ...tasks.topic import VOCAB_SIZE, topic_documents
from ...train import Schedule, constant, lanes, stepped
from . import Recipe

CHUNK = 32
DOCUMENTS = 48  # in a batch
MEMORY_LAYER = 1
STEPS = 500
HELDOUT_SEED = 10**6


def tokenizer():
    """One word per token: t0 … t47, separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCAB_SIZE)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="t0"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, bos_token=None, pad_token=None)


class Lanes(torch.utils.data.Dataset):
    """Item i is the batch of step i: the previous chunks of 48 documents, then their current chunks, [96, 32]."""

    def __init__(self, batches: int, seed: int):
        self.batches, self.seed = batches, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rows = previous_then_current(DOCUMENTS, (self.seed + 1) * 10**8 + i)
        return {"input_ids": rows, "labels": rows}


def previous_then_current(documents: int, seed: int) -> torch.Tensor:
    """int64 [2 * documents, 32]: the first chunks of fresh documents, then their second chunks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = topic_documents(documents, 2 * CHUNK, generator)
    return torch.cat(tokens.split(CHUNK, dim=1))


def data(tok, seed: int, examples: int):
    return Lanes(examples, seed), None


@torch.no_grad()
def measure(model, in_memory: int, documents: int = 128, seed: int = HELDOUT_SEED) -> dict[str, float]:
    """Loss and attention of the current chunks of unseen documents, each with `in_memory` documents in the memory.

    loss: nats per token, over the tokens from the 9th on. r: the positive share r_d as the mean over heads, tokens and
    documents of the ratio; r_of_means: ratio of the mean masses. memory_share: attention that leaves the window. With in_memory 0
    only the loss.
    """
    from ...focused import FocusedAttention
    from ...methods.focused import lane_contexts, positive_share

    rows = previous_then_current(documents, seed)
    settings = FocusedAttention((MEMORY_LAYER,), memory_positions=False)
    with settings(model) as focused, focused.recording() as masses:
        logits = model(rows, contexts=lane_contexts(documents, in_memory)).logits[documents:, 8:-1]
    targets = rows[documents:, 9:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    if not in_memory:
        return {"loss": loss}
    mass = masses[MEMORY_LAYER][documents:, :, 8:]
    average = mass.mean((0, 1, 2))
    return {
        "loss": loss,
        "r": positive_share(mass).mean().item(),
        "r_of_means": positive_share(average).item(),
        "memory_share": average[1:].sum().item(),
    }


def score(model, tok) -> dict[str, float]:
    """Held-out loss without memory, then loss and r with 1, 8 and 32 documents in the memory."""
    figures = measure(model, 0)
    for d in (1, 8, 32):
        at = measure(model, d)
        figures |= {f"loss_at_{d}": at["loss"], f"r_at_{d}": at["r"]}
    return figures


def _recipe(name: str, about: str, d: Schedule, steps: int = STEPS) -> Recipe:
    return Recipe(
        name=name,
        about=f"three-layer LLaMA on the topic task, {about}",
        data_about="topic documents, made by lcx.tasks.topic: 48 tokens, two chunks of 32",
        config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": CHUNK,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": 0.12,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "mem_layers": [MEMORY_LAYER],
            "mem_positionals": False,  # as in the small models of the paper
            "mem_dtype": "float32",
            "last_context_length": CHUNK,
        },
        steps=steps,
        batch_size=1,
        training={
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 50,
            "weight_decay": 0.0,
        },
        tokenizer=tokenizer,
        data=data,
        score=score,
        contexts=lanes(d),
    )


RECIPES = (
    _recipe("topic-plain", "trained without a memory", constant(0)),
    _recipe("topic-d1", "trained with its own previous chunk", constant(1)),
    _recipe("topic-d8", "trained with its own previous chunk and 7 of others", constant(8)),
    _recipe("topic-d2-32", "trained with 1 foreign chunk, then 31", stepped([(0, 2), (400, 32)]), steps=600),
)
