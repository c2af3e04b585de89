"""Training with a memory: transformers.Trainer does the work, this file says who sees whom at which step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import Trainer

from .attention import causal_lm
from .errors import LcxError
from .methods.focused import crossbatch_contexts, crossbatch_schedule, lane_contexts

Schedule = Callable[[int], int]  # optimiser step -> d or range
Contexts = Callable[[int, int], torch.Tensor]  # optimiser step, entries of the batch -> int64 [entries, C]


def constant(d: int) -> Schedule:
    """The same d in every step."""
    return lambda step: d


def stepped(stages: Sequence[tuple[int, int]]) -> Schedule:
    """d from stages (first step, d): [(0, 2), (450_000, 64)] is the paper's 2 → 64. Raises LcxError unless sorted from 0."""
    starts = [start for start, _ in stages]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise LcxError(f"stages must start at step 0 and be in order, got the starts {starts}")
    return lambda step: next(d for start, d in reversed(stages) if step >= start)


def sampled(choices: Sequence[int], seed: int = 0) -> Schedule:
    """One of `choices` in each step, drawn evenly; (2, 128) is the paper's fine-tuning. The same step draws the same again."""
    if not choices:
        raise LcxError("choices is empty: give at least one d")

    def draw(step: int) -> int:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    return draw


def lanes(d: Schedule) -> Contexts:
    """Contexts of a batch of previous chunks followed by current chunks (the paper's small models): see lane_contexts."""
    return lambda step, entries: lane_contexts(entries // 2, min(d(step), entries // 2))


def packs(chunks_per_doc: int, context_range: Schedule, stepping: bool = True) -> Contexts:
    """Contexts of a batch of documents of `chunks_per_doc` chunks each (LongLLaMA): see crossbatch_schedule.

    The batch is what one process computes at once: neither other processes nor other micro-batches of gradient accumulation give negatives,
    as in the released code. More negatives take more documents per device.
    """

    def contexts(step: int, entries: int) -> torch.Tensor:
        schedule = crossbatch_schedule(chunks_per_doc, context_range(step), stepping)
        return crossbatch_contexts(schedule, entries)

    return contexts


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join items into one batch. An item is one row [S] or several [rows, S]; its rows stay together."""
    return {key: torch.cat([torch.atleast_2d(item[key]) for item in items]) for key in items[0]}


class Documents(torch.utils.data.Dataset):
    """Token lists cut into items of `chunks_per_doc` chunks: input_ids and labels, int64 [chunks_per_doc, chunk].

    Documents are joined in their order, each with bos before and eos after it where the tokenizer has them, and cut
    where an item is full, so nothing is padded (a short document shares an item with the next). The target of a chunk's
    last token is the first of the next chunk: labels come shifted, under shift_labels. eos is a target, bos is not.

    Raises LcxError if the text is shorter than one item.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        chunk: int,
        chunks_per_doc: int,
        bos: int | None = None,
        eos: int | None = None,
    ):
        before, after = ([] if mark is None else [mark] for mark in (bos, eos))
        tokens: list[int] = []
        starts = []  # where a bos stands: its id can be that of eos
        for document in documents:
            starts.append(len(tokens))
            tokens += [*before, *document, *after]
        size = chunk * chunks_per_doc
        if len(tokens) <= size:
            fewer = "" if chunks_per_doc == 1 else ", shorter or fewer chunks"
            raise LcxError(
                f"the text has {len(tokens)} tokens, one item needs {size + 1}: use more text{fewer}"
            )
        count = (len(tokens) - 1) // size
        inputs = torch.tensor(tokens[: count * size + 1], dtype=torch.int64)
        targets = inputs.clone()
        if bos is not None:
            targets[[start for start in starts if start < len(targets)]] = -100
        self.inputs = inputs[:-1].view(count, chunks_per_doc, chunk)
        self.targets = targets[1:].view_as(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        # Trainer counts the targets in `labels`, the loss is taken on shift_labels.
        return {"input_ids": self.inputs[i], "labels": self.targets[i], "shift_labels": self.targets[i]}


class OrderedTrainer(Trainer):
    """Trainer that can read its dataset from start to end (in_order), for data that change as training goes on."""

    def __init__(self, *args: Any, in_order: bool = False, **kwargs: Any):
        self.in_order = in_order
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args):
        if self.in_order:
            return torch.utils.data.SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(*args)


class CrossBatchTrainer(OrderedTrainer):
    """Trainer for a model inside FocusedAttention: every batch goes to the model with the contexts of the current step.

    contexts: step, entries -> int64 [entries, C], from `lanes` or `packs`. in_order: see OrderedTrainer.

    Raises LcxError if the model is not inside FocusedAttention, and if one process holds several GPUs.
    """

    def __init__(self, *args: Any, contexts: Contexts, **kwargs: Any):
        self.contexts = contexts
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:  # torch.nn.DataParallel would tear the contexts apart
            raise LcxError(
                f"{self.args.n_gpu} GPUs in one process: start with torchrun --nproc_per_node {self.args.n_gpu}, "
                "or choose one with CUDA_VISIBLE_DEVICES=0"
            )

    def train(self, *args, **kwargs):
        # Without it the model would take `contexts` and ignore them.
        if not any("forward" in vars(layer.self_attn) for layer in causal_lm(self.model).model.layers):
            raise LcxError("no layer reads the contexts: train inside `with FocusedAttention(...)(model):`")
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        table = self.contexts(self.state.global_step, len(inputs["input_ids"]))
        return super().compute_loss(
            model, {**inputs, "contexts": table.to(inputs["input_ids"].device)}, *args, **kwargs
        )
