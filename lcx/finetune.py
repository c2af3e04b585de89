"""What every `lcx train …` does: go on training a model inside a method, and leave a plain checkpoint with a card."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from .chat import is_conversation
from .corpora import cached_texts, text
from .errors import LcxError
from .fetch import staging
from .results import made_by, write_json

CHECKPOINTS = "checkpoints"  # inside the output folder, until training is finished
LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4  # the first is LongLLaMA's
LR_SCHEDULES = ("constant", "linear", "cosine")  # after the warm-up, the last two down to 0


Text = str | list[dict[str, str]]  # a document, or a conversation


def read_texts(sources: Sequence[str]) -> list[Text]:
    """The documents in `sources`: the name of a corpus, a .jsonl file with a "text" in each line, or with "messages", each
    of them a role and a content, any other file as one document, or a folder, of which every .txt and .jsonl file is
    read, in the order of their paths.

    Raises LcxError if there is nothing to read.
    """
    texts: list[Text] = []
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


def _file(path: Path) -> list[Text]:
    try:
        whole = path.read_text("utf-8")
        if path.suffix != ".jsonl":
            return [whole]
        return [_document(json.loads(line)) for line in whole.split("\n") if line.strip()]
    except UnicodeDecodeError as e:
        raise LcxError(f"{path} is not UTF-8 text: convert it") from e
    except (ValueError, AttributeError) as e:
        raise LcxError(
            f'{path}: every line must be a JSON object with a field "text", or "messages" with role and content'
        ) from e


def _document(line: dict[str, Any]) -> Text:
    if isinstance(line.get("text"), str):
        return line["text"]
    if not is_conversation(line.get("messages")):
        raise ValueError
    return line["messages"]


@dataclass(frozen=True)
class Settings:
    """What decides what comes out of a training, whatever the method. A subclass adds the options of its method."""

    conversations: ClassVar[bool] = False  # does the method take them?
    model: str
    data: tuple[str, ...]
    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float | None = None
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    lora_rank: int = 0
    seed: int = 0
    bf16: bool = False

    def check(self) -> None:
        """Raise LcxError, before anything is read, if the settings do not fit each other."""
        if self.lr_schedule not in LR_SCHEDULES:
            raise LcxError(f"lr_schedule {self.lr_schedule!r} is none: use {', '.join(LR_SCHEDULES)}")
        if self.warmup_steps >= self.steps:
            raise LcxError(
                f"warmup_steps {self.warmup_steps} leave none of {self.steps} steps at the learning rate: use fewer"
            )
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise LcxError("LoRA needs the package peft: python -m pip install peft")

    def method(self, model, tokenizer, texts: Sequence[Text]) -> Method:
        """What the method brings. It may add tokens to model and tokenizer."""
        raise TypeError(f"{type(self).__name__} names no method: use FocusedSettings or LandmarkSettings")


@dataclass(frozen=True)
class Method:
    """What a method brings to the common course of a training.

    attention: model -> context manager in which the model computes. documents: a lcx.train.Documents, made inside that context; item: what
    its items are called. fields: what config.json says of the method. new_tokens: tokens whose embeddings are new, so that LoRA
    trains them too. trainer: called like transformers.Trainer, which it is by default.
    """

    about: str
    attention: Callable
    documents: Callable
    item: str
    fields: dict[str, Any]
    new_tokens: tuple[int, ...] = ()
    trainer: Callable | None = None


def finetune(s: Settings, out: Path, save_steps: int = 200, command: str = "lcx.finetune") -> dict[str, Any]:
    """Train s.model on s.data by the method of s, write it to `out` and return the card.

    `out` becomes a plain transformers checkpoint whose config says what the method needs to know. If a run was killed,
    the same call goes on from its last checkpoint in `out`; a finished run is left as it is. Under torchrun all processes
    train and the first one writes.

    Raises LcxError in one line for settings that do not fit each other, the model or the data, or an `out` in use.
    """
    s = replace(s, learning_rate=s.learning_rate or (LORA_LEARNING_RATE if s.lora_rank else LEARNING_RATE))
    s.check()
    texts = read_texts(s.data)
    if not s.conversations and not all(isinstance(t, str) for t in texts):
        raise LcxError('conversations are for lcx train cream: give data with a field "text"')

    import torch
    from torch.utils.data import Subset
    from transformers import Trainer

    from .models import _no_progress_bars, load
    from .train import collate
    from .zoo.training import kept_random_state

    arguments = _arguments(s, out, save_steps)
    whole = "\0".join(t if isinstance(t, str) else json.dumps(t) for t in texts)
    data = hashlib.sha256(whole.encode()).hexdigest()
    settings = asdict(s) | {"data_sha256": data, "processes": arguments.world_size}
    settings = json.loads(json.dumps(settings))  # as it is read back: tuples become lists
    with arguments.main_process_first(local=False):  # one process claims and fetches, the others find it done
        card, resumed = _earlier(out, settings)
        if card:
            return card
        lm, tokenizer = load(s.model, device="cpu", dtype=torch.float32)
    with kept_random_state(), _no_progress_bars():
        torch.manual_seed(s.seed)
        method = s.method(lm, tokenizer, texts)
        use_cache, parameters = lm.config.use_cache, lm.num_parameters()  # Trainer and LoRA change them
        model = _with_lora(lm, s.lora_rank, method.new_tokens) if s.lora_rank else lm
        with method.attention(model):
            documents = method.documents()
            batch = s.batch_size * s.gradient_accumulation * arguments.world_size
            if len(documents) < batch:
                raise LcxError(
                    f"the text gives {len(documents)} {method.item}, one step needs {batch}: use more text, a smaller "
                    "batch, or fewer tokens in each"
                )
            lm.config.update(method.fields)
            trainer = (method.trainer or Trainer)(
                model=model,
                args=arguments,
                # Whole steps only: a smaller batch would have fewer negatives.
                train_dataset=Subset(documents, range(len(documents) // batch * batch)),
                data_collator=collate,
            )
            before = time.time()
            with warnings.catch_warnings():
                # The whole embedding goes into checkpoints when it has grown, says peft. That is right.
                warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
                trainer.train(resume_from_checkpoint=resumed)
            seconds = time.time() - before
        card = {
            "about": f"{s.model}, {method.about}",
            "data": f"{', '.join(s.data)}: {len(texts):,} documents, {documents.inputs.numel():,} tokens",
            "made_by": made_by(command, s.seed),
            "parameters": parameters,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * batch * documents.inputs[0].numel(),
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


def _arguments(s: Settings, out: Path, save_steps: int):
    import torch
    from transformers import TrainingArguments

    checkpointing = "activation_checkpointing"
    if checkpointing not in TrainingArguments.__dataclass_fields__:  # older versions of transformers
        checkpointing = "gradient_checkpointing"
    try:
        arguments = TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            seed=s.seed,
            max_steps=s.steps,
            per_device_train_batch_size=s.batch_size,
            gradient_accumulation_steps=s.gradient_accumulation,
            learning_rate=s.learning_rate,
            # transformers' "constant" would leave out the warm-up
            lr_scheduler_type="constant_with_warmup" if s.lr_schedule == "constant" else s.lr_schedule,
            warmup_steps=s.warmup_steps,
            weight_decay=s.weight_decay,
            adam_beta2=s.adam_beta2,
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
    if (
        arguments.n_gpu > 1
    ):  # torch.nn.DataParallel copies the model without what the method has put in its place
        raise LcxError(
            f"{arguments.n_gpu} GPUs in one process: start with torchrun --nproc_per_node {arguments.n_gpu}, "
            "or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


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


def _with_lora(model, rank: int, new_tokens: Sequence[int]):
    from peft import LoraConfig, get_peft_model

    rows = list(new_tokens) or None
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", trainable_token_indices=rows
    )
    return get_peft_model(model, config)


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
