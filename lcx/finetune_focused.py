"""`lcx train focused`: some layers of the model learn to read a memory (Focused Transformer, section 4.1; LongLLaMA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import LcxError
from .finetune import Method, Settings
from .methods.focused import crossbatch_schedule


@dataclass(frozen=True)
class FocusedSettings(Settings):
    """All that decides what comes out: the options of `lcx train focused`, which says what each is."""

    memory_layers: tuple[int, ...] | None = None
    window: int | None = None
    chunks_per_doc: int = 4
    schedule: str = "constant"
    range: str = "3"
    stepping: bool = True

    def check(self) -> None:
        super().check()
        _, taken = read_schedule(self.schedule, self.range)
        if max(taken) and self.chunks_per_doc < 2:
            raise LcxError(
                f"range {self.range} with 1 chunk per document has no positives: use --chunks-per-doc 2 or more, or --range 0"
            )
        schedules = (crossbatch_schedule(self.chunks_per_doc, d, self.stepping) for d in taken)
        if self.batch_size < 2 and any(n for schedule in schedules for _, n in schedule):
            raise LcxError(
                f"range {self.range} asks for negatives, and 1 document per process has none: use --batch-size 2 or "
                "more, or for positives only --chunks-per-doc 2 --range 1"
            )

    def method(self, model, tokenizer, texts: Sequence[str]) -> Method:
        from .focused import FocusedAttention
        from .train import CrossBatchTrainer, Documents, packs

        window = self.window or min(model.config.max_position_embeddings, 2048)
        layers = self.memory_layers or default_layers(model.config.num_hidden_layers)
        ids = (tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in texts)
        marks = tokenizer.bos_token_id, tokenizer.eos_token_id
        ranges, _ = read_schedule(self.schedule, self.range)
        return Method(
            about=f"trained by crossbatch to read a memory in layers {', '.join(map(str, layers))}",
            attention=FocusedAttention(layers, window),
            documents=lambda: Documents(ids, window, self.chunks_per_doc, *marks),
            item=f"packs of {self.chunks_per_doc} chunks",
            fields=_memory_fields(layers, window, self.bf16),
            trainer=partial(CrossBatchTrainer, contexts=packs(self.chunks_per_doc, ranges, self.stepping)),
        )


def default_layers(count: int) -> tuple[int, ...]:
    """Three layers at a quarter, half and three quarters of `count`: (6, 12, 18) of 26, as in LongLLaMA-3B."""
    step = max(count // 4, 1)
    return tuple(i for i in (step, 2 * step, 3 * step) if i < count) or (0,)


def read_schedule(kind: str, values: str):
    """(d for each step, all values it takes) from the words of the command line.

    constant "3"; stepped "0:1,1000:7", from step 0 on 1, from step 1,000 on 7; sampled "2,128", one of them each step.
    Raises LcxError if kind or values are none of these.
    """
    from .train import constant, sampled, stepped

    try:
        pairs = [tuple(int(n) for n in part.split(":")) for part in values.split(",")]
        widths, taken = {len(pair) for pair in pairs}, [pair[-1] for pair in pairs]
        if min(taken) >= 0:
            if kind == "constant" and widths == {1} and len(pairs) == 1:
                return constant(taken[0]), taken
            if kind == "stepped" and widths == {2}:
                return stepped(pairs), taken
            if kind == "sampled" and widths == {1}:
                return sampled(taken), taken
    except ValueError:
        pass
    raise LcxError(
        f"schedule {kind!r} with range {values!r}: use constant 3, stepped 0:1,1000:7, or sampled 2,128"
    )


def _memory_fields(layers: Sequence[int], window: int, bf16: bool) -> dict[str, Any]:
    """What lcx.longllama reads from a config."""
    return {
        "max_position_embeddings": window,  # in LongLLaMA this is the local window
        "mem_layers": list(layers),
        "mem_positionals": True,
        "mem_dtype": "bfloat16" if bf16 else "float32",
        "last_context_length": max(window // 2, 1),  # LongLLaMA: 1,024 of 2,048
    }
