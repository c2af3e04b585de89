"""dictionary-*: the paper's synthetic task at reduced size (section 4.5): look up four-token keys in a memory of definitions."""

from __future__ import annotations

import dataclasses

import torch

from ...tasks.dictionary import ASK, BOS, CONTENT, DEFINE, VALUE, VOCAB_SIZE, dictionary
from ...train import Schedule, constant, lanes, stepped
from . import Recipe, needle_memory
from .needle_64 import HELDOUT_SEED

CHUNK = 64  # six records
DOCUMENTS = 48  # in a batch
# From which step on: different keys in a document. Six at once were not learned in 1,750 steps.
STAGES = ((0, 1), (400, 2), (700, 3), (1000, 6))
FOCUSED = stepped([(0, 1), (1200, 4), (1400, 16), (1600, 32)])
STEPS = 1900


def tokenizer():
    """One word per token: <bos>, <k>, <q>, <v>, then c0 … c63, separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {BOS: "<bos>", DEFINE: "<k>", ASK: "<q>", VALUE: "<v>"}
    words = {word: i for i, word in names.items()} | {f"c{i}": t for i, t in enumerate(CONTENT)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, bos_token="<bos>", pad_token="<bos>")


class Lanes(needle_memory.Lanes):
    """Item i is the batch of step i: the definitions of 48 documents, then their questions, [96, 64]."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        keys = next(keys for start, keys in reversed(STAGES) if i >= start)
        generator = torch.Generator().manual_seed((self.seed + 1) * 10**8 + i)
        rows = dictionary(DOCUMENTS, CHUNK, keys, generator)
        return {
            name: t.transpose(0, 1).flatten(0, 1)
            for name, t in zip(("input_ids", "labels"), rows, strict=True)
        }


def data(tok, seed: int, examples: int):
    return Lanes(examples, seed), None


@torch.no_grad()
def accuracy(model, in_memory: int, questions: int = 48, seed: int = HELDOUT_SEED) -> tuple[float, float]:
    """(accuracy per value token, loss in nats) with the definitions of `in_memory` unseen documents in the memory."""
    from ...focused import FocusedAttention
    from ...methods.focused import lane_contexts

    documents = max(questions, in_memory)
    ids, labels = dictionary(documents, CHUNK, generator=torch.Generator().manual_seed(seed))
    with FocusedAttention.of(model)(model):
        rows = ids.transpose(0, 1).flatten(0, 1)
        logits = model(rows, contexts=lane_contexts(documents, in_memory)).logits[documents:, :-1]
    targets = labels[:, 1, 1:]
    scored = targets != -100
    loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored]).item()
    return (logits.argmax(-1)[scored] == targets[scored]).float().mean().item(), loss


def score(model, tok) -> dict[str, float]:
    """Held-out loss and accuracy with the own definitions in the memory, accuracy with those of 8 and of 48 documents."""
    own, loss = accuracy(model, 1)
    return {"loss": loss, "accuracy": own} | {f"accuracy_at_{d}": accuracy(model, d)[0] for d in (8, 48)}


def _recipe(name: str, about: str, d: Schedule, steps: int = STEPS) -> Recipe:
    return dataclasses.replace(
        needle_memory.RECIPES[0],
        name=name,
        about=f"four-layer LLaMA that looks up definitions in a memory, {about}",
        data_about="dictionary lookup, made by lcx.tasks.dictionary: 64 content tokens, keys and values of 4, two chunks of 64",
        config={
            **needle_memory.RECIPES[0].config,
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": BOS,
            "pad_token_id": BOS,
        },
        steps=steps,
        tokenizer=tokenizer,
        data=data,
        score=score,
        contexts=lanes(d),
    )


RECIPES = (
    _recipe("dictionary", "trained with up to 31 negatives", FOCUSED),
    _recipe("dictionary-d1", "trained with its own definitions only", constant(1), 1600),
    _recipe("dictionary-plain", "trained without a memory", constant(0), 300),
)
