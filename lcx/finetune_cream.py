"""`lcx train cream`: rows of one window under the position labels of a text many times as long (CREAM, Wu et al. 2024; PoSE)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from .chat import encode_chat
from .errors import LcxError
from .finetune import Method, Settings, Text
from .methods import cream
from .methods.coverage import coverage
from .methods.scaling import METHODS, scale_rope
from .train import Documents, OrderedTrainer, collate

SAMPLERS = ("cream", "pose", "randpos", "full")
LEFT_OUT = 0.1  # share of the distances without an example from which on a training says so before it begins


@dataclass(frozen=True)
class CreamSettings(Settings):
    """All that decides what comes out: the options of `lcx train cream`, which says what each is.

    A row has as many tokens as the model's window, with sampler "full" factor times as many. Of a conversation only what
    the assistant says is predicted.
    """

    conversations: ClassVar[bool] = True
    preset: str | None = None  # the name alone: its options are in the other fields
    sampler: str = "cream"
    factor: int = 8
    sigma: float | None = None
    k: int | None = None
    released: bool = False
    scaling: str = "linear"

    def check(self) -> None:
        super().check()
        for name, value, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("scaling", self.scaling, tuple(m for m in METHODS if m != "dynamic")),
        ):
            if value not in known:  # dynamic NTK would follow the labels
                raise LcxError(f"{name} {value!r} is none to train with: use one of {', '.join(known)}")
        if self.sampler != "cream" and (self.sigma is not None or self.k is not None or self.released):
            raise LcxError(f"sigma, k and released are CREAM's: leave them out with --sampler {self.sampler}")

    def method(self, model, tokenizer, texts: Sequence[Text]) -> Method:
        window = model.config.max_position_embeddings
        draw = self.labels(window)
        draw(np.random.default_rng(0))  # says now what does not fit the window
        self._warn_of_holes(draw, window)
        length = window * self.factor if self.sampler == "full" else window
        scale_rope(model, self.scaling, self.factor)  # for good: the checkpoint keeps it
        tokenizer.model_max_length = window * self.factor
        batch = self.batch_size * self.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
        return Method(
            about=f"trained with rows of {length} tokens ({self.sampler}, {self.scaling} RoPE) for {window * self.factor}",
            attention=lambda model: nullcontext(),
            documents=lambda: Rows(joined(tokenizer, texts, length), batch, self.steps, self.seed),
            item=f"rows of {length} tokens",
            fields={},
            trainer=partial(_trainer, PositionLabels(draw, self.seed)),
        )

    def _warn_of_holes(self, draw, window: int) -> None:
        if self.sampler not in ("cream", "pose") or os.environ.get("RANK", "0") != "0":
            return
        rows = iter(draw(np.random.default_rng(self.seed), size=1000))
        missed = coverage(lambda _: next(rows), window, self.factor, examples=1000).missed_distances
        if missed > LEFT_OUT:
            warnings.warn(
                f"1,000 rows of these labels leave out {missed:.0%} of the distances up to {window * self.factor}: what stands "
                "there stays untrained; a wider sigma reaches it",
                stacklevel=2,
            )

    def labels(self, window: int) -> Callable[[np.random.Generator], np.ndarray]:
        """The sampler: generator -> int64 labels of one row, for a model with this window."""
        n, f = window, self.factor
        if self.sampler == "cream":
            return partial(cream.cream_positions, n, f, sigma=self.sigma, k=self.k, release=self.released)
        if self.sampler == "full":
            return lambda rng: cream.cream_positions(n * f, 1, rng)
        sampler = cream.pose_positions if self.sampler == "pose" else cream.randpos_positions
        return partial(sampler, n, f)


def joined(tokenizer, texts: Sequence[Text], length: int) -> Documents:
    """Documents and conversations one after the other in rows of `length` tokens. Of a conversation only what the assistant
    says is a target; rows without a target are left out.

    Raises LcxError if the text is shorter than one row, if no row has a target, and as `encode_chat`.
    """
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id
    if all(isinstance(text, str) for text in texts):
        ids = (tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in texts)
        return Documents(ids, length, 1, *marks)
    encoded = list(_encoded(tokenizer, texts, *marks))
    documents, wanted = (Documents(part, length, 1) for part in zip(*encoded, strict=True))
    documents.targets[wanted.targets == 0] = -100
    some = wanted.targets.any(-1).any(-1)
    if not some.any():
        raise LcxError(
            "no message in the data is the assistant's, so there is nothing to learn: check the roles"
        )
    documents.inputs, documents.targets = documents.inputs[some], documents.targets[some]
    return documents


def _encoded(
    tokenizer, texts: Sequence[Text], bos: int | None, eos: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, for each of them 1 if it is to be predicted) of every document and conversation."""
    for text in texts:
        if not isinstance(text, str):  # the template has its own marks
            yield encode_chat(tokenizer, text)
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        before, after = ([] if mark is None else [mark] for mark in (bos, eos))
        yield [*before, *ids, *after], [*(0 for _ in before), *(1 for _ in ids), *(1 for _ in after)]


def _trainer(collator, **options: Any) -> OrderedTrainer:
    return OrderedTrainer(**options | {"data_collator": collator}, in_order=True)


class PositionLabels:
    """A collator that gives every example the position labels of a longer text, and the mask they cannot do without.

    draw: generator -> int64 [n], as `functools.partial(lcx.cream_positions, n, factor)`; a partial of the samplers that
    take a list of generators draws a whole batch at once. Examples have input_ids [n] or [1, n] and
    "index", which with the seed decides the labels, whatever the workers and the batch. Without the all-ones
    attention_mask transformers would take each jump for a new text and cut the attention there.

    Raises LcxError for an example that has another length than its labels: nothing is padded or cut.
    """

    def __init__(self, draw: Callable[[np.random.Generator], np.ndarray], seed: int = 0):
        self.draw, self.seed = draw, seed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([{k: v for k, v in item.items() if k != "index"} for item in items])
        generators = [np.random.default_rng([self.seed, int(item["index"])]) for item in items]
        whole = getattr(self.draw, "func", self.draw) in cream.BATCHED
        drawn = self.draw(generators) if whole else np.stack([self.draw(g) for g in generators])
        labels, n = torch.from_numpy(drawn), batch["input_ids"].shape[1]
        if labels.shape != batch["input_ids"].shape:
            raise LcxError(
                f"examples of {n} tokens for {labels.shape[1]} position labels: join short texts and cut long ones to {labels.shape[1]}"
            )
        mask = torch.ones_like(batch["input_ids"])
        return batch | {"position_ids": labels, "attention_mask": mask}


class Rows(torch.utils.data.Dataset):
    """All rows that a training reads, in order: documents over and over, in each pass in another order, each visit with an index
    of its own, so that a row that comes again has other labels. Fewer rows than one batch are left as they are."""

    def __init__(self, documents: Documents, batch: int, steps: int, seed: int):
        self.documents, self.inputs, self.seed = documents, documents.inputs, seed
        count = len(documents)
        self.visits = max(steps * batch, count) if count >= batch else count
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.visits

    def __getitem__(self, i: int) -> dict[str, Any]:
        turn, place = divmod(i, len(self.documents))
        if self._order is None or self._order[0] != turn:
            rng = np.random.default_rng([self.seed, turn])
            self._order = turn, rng.permutation(len(self.documents))
        return self.documents[int(self._order[1][place])] | {"index": i}
