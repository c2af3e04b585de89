"""landmark-256 and its plain twin: needle-copy in 256 tokens, landmarks included. Chapter 8 asks them at 32,768 and beyond."""

from __future__ import annotations

import torch

from ...tasks.needle_copy import BOS, FILLER, NEEDLE, VOCAB_SIZE, needle_copy
from . import COPYING, Recipe
from .needle_64 import HELDOUT_SEED

BLOCK = 16  # tokens of a block, its landmark included
TRAIN_LENGTH = 256
LANDMARK = VOCAB_SIZE
NEEDLE_TOKENS, CUE = 8, 2  # two tokens of the repeat say which needle is meant
ROWS = 256  # blocks in a batch
# From which step on: rows of how many blocks, and at most how many needles. Copying forms where there is little to search,
# in a few hundred steps; on the full mixture from the start it takes three times as many.
STAGES = ((0, (4,), 1), (300, (4, 8), 1), (500, (4, 8, 12, 16), 4))


def tokenizer():
    """One readable word per token: <bos>, f0 … f15 for filler, n0 … n63 for needle tokens, <landmark>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", *(f"f{i}" for i in range(len(FILLER))), *(f"n{i}" for i in range(len(NEEDLE)))]
    word_level = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<bos>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=word_level, bos_token="<bos>", pad_token="<bos>")
    made.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
    return made


class Batches(torch.utils.data.Dataset):
    """Item i is the batch of step i, [rows, tokens]: rows of one length, their number such that it has 256 blocks."""

    def __init__(self, batches: int, seed: int, make=needle_copy):
        self.batches, self.seed, self.make = batches, seed, make

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 10**8 + i)
        lengths, most = next((lengths, most) for start, lengths, most in reversed(STAGES) if i >= start)
        blocks = lengths[int(torch.randint(len(lengths), (1,), generator=generator))]
        most = min(most, blocks // 2)
        needles = 1 + int(torch.randint(most, (1,), generator=generator))
        rows = self.make(
            ROWS // blocks,
            blocks * (BLOCK - 1),
            NEEDLE_TOKENS,
            generator=generator,
            needles=needles,
            cue=CUE,
        )
        return dict(zip(("input_ids", "labels"), rows, strict=True))


def data(tok, seed: int, examples: int):
    return Batches(examples, seed), None


@torch.no_grad()
def accuracy(
    model,
    length: int,
    sequences: int = 64,
    needles: int = 2,
    seed: int = HELDOUT_SEED,
    make=needle_copy,
    **settings,
) -> tuple[float, float]:
    """(accuracy, loss in nats) on the repeat in fresh sequences of `length` tokens, landmarks included where there are any.

    make: what makes the sequences, called like needle_copy. settings: changes to LandmarkAttention.of(model). A model without landmarks reads the same tokens as it is.
    """
    from contextlib import nullcontext

    from ...landmark import LandmarkAttention

    ids, labels = make(
        sequences,
        length // BLOCK * (BLOCK - 1),
        NEEDLE_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        needles=needles,
        cue=CUE,
    )
    landmarks = hasattr(model.config, "mem_freq")
    keep = NEEDLE_TOKENS
    with LandmarkAttention.of(model, **settings)(model) if landmarks else nullcontext():
        logits = model(ids, logits_to_keep=keep, use_cache=landmarks).logits[:, CUE - 1 : -1].float()
    targets = labels[:, CUE - keep :]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return (logits.argmax(-1) == targets).float().mean().item(), loss


def score(model, tok, make=needle_copy) -> dict[str, float]:
    """Held-out loss and accuracy at the training length, accuracy at 4 and 16 times as many tokens."""
    inside, loss = accuracy(model, TRAIN_LENGTH, 256, make=make)
    return {"loss": loss, "accuracy": inside} | {
        f"accuracy_at_{n}": accuracy(model, n, 16, make=make)[0]
        for n in (4 * TRAIN_LENGTH, 16 * TRAIN_LENGTH)
    }


def make_recipe(name: str, about: str, landmarks: bool, landmark_id: int = LANDMARK, **changes) -> Recipe:
    """The recipe of one model. changes: fields of Recipe that differ from those of landmark-256."""
    extra = {
        "mem_freq": BLOCK - 1,
        "mem_id": landmark_id,
        "train_context_length": TRAIN_LENGTH,
        "include_landmark_in_loss": False,
    }
    fields = dict(
        name=name,
        about=f"three-layer LLaMA that copies needles over 256 tokens, {about}",
        data_about="needle-copy, made by lcx.tasks.needle_copy: 16 filler types, 64 needle types, 1 to 4 needles of 8 tokens, "
        "rows of 60 to 240 tokens",
        config={
            "vocab_size": landmark_id + 1,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": TRAIN_LENGTH,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": 0.05,
            "bos_token_id": BOS,
            "eos_token_id": None,
            "pad_token_id": BOS,
        }
        | (extra if landmarks else {}),
        steps=2000,
        batch_size=1,
        training={"learning_rate": 2e-3, **COPYING},
        tokenizer=tokenizer,
        data=data,
        score=score,
        in_order=True,
    )
    return Recipe(**fields | changes)


RECIPES = (
    make_recipe("landmark-256", "trained with a landmark in every block of 16", True),
    make_recipe("landmark-256-plain", "its twin without landmarks", False),
)
