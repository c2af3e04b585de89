"""Train a zoo model with transformers.Trainer: resumable after a kill, saved under 4 MB, with a card."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import LcxError
from ..fetch import cache_dir, sha256, staging
from ..results import made_by, write_json
from .recipes import Recipe

MAX_BYTES = 4_000_000


@contextmanager
def kept_random_state():
    """Trainer seeds the global generators of Python, numpy and torch. Put them back afterwards."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def work_dir(recipe: Recipe, seed: int, steps: int) -> Path:
    """Where the checkpoints of this very training lie. A changed recipe gets another folder, so it never resumes
    from weights that do not belong to it."""
    key = json.dumps(
        [recipe.config, recipe.training, recipe.batch_size, recipe.data_about, steps, seed], sort_keys=True
    )
    return cache_dir() / "training" / f"{recipe.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint. Trainer writes trainer_state.json last, so one without it is half-written."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found.append(
                (json.loads((checkpoint / "trainer_state.json").read_text())["global_step"], str(checkpoint))
            )
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(found)[1] if found else None


def _accuracy(prediction) -> dict[str, float]:
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    scored = labels != -100
    return {"accuracy": float((guesses == labels)[scored].mean())}


def _stopper(recipe: Recipe):
    from transformers import TrainerCallback

    class StopAtAccuracy(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            if metrics.get("eval_accuracy", 0.0) >= recipe.stop_accuracy:
                control.should_training_stop = True

    return StopAtAccuracy()


def make_trainer(recipe: Recipe, model, tokenizer, work: Path, seed: int, steps: int):
    """The Trainer of a recipe, a CrossBatchTrainer if the recipe says who sees whom. Checkpoints go to `work`."""
    import torch
    from transformers import TrainingArguments

    from ..train import CrossBatchTrainer, OrderedTrainer, collate

    train, heldout = recipe.data(tokenizer, seed, steps * recipe.batch_size)
    stops = recipe.stop_accuracy is not None
    arguments = TrainingArguments(
        output_dir=str(work),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=64,
        eval_strategy="steps" if stops else "no",
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=min(50, max(1, steps // 10)),
        report_to=[],
        disable_tqdm=os.environ.get("LCX_STATIC") == "1",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **recipe.training,
    )
    kind, options = OrderedTrainer, {"in_order": recipe.in_order}
    if recipe.contexts:
        kind, options = CrossBatchTrainer, {"contexts": recipe.contexts, "in_order": True}
    return kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=heldout if stops else None,
        data_collator=collate,
        compute_metrics=_accuracy if stops else None,
        preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1)) if stops else None,
        callbacks=[_stopper(recipe)] if stops else None,
        **options,
    )


def run(recipe: Recipe, out: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """Train, save to `out` and return the card. Raises LcxError if the files are too large for the zoo."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..focused import FocusedAttention
    from ..landmark import LandmarkAttention

    wanted, steps = steps, steps or recipe.steps
    work = work_dir(recipe, seed, steps)
    with kept_random_state():
        tokenizer = recipe.tokenizer()
        special = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**recipe.config, **special}))
        trainer = make_trainer(recipe, model, tokenizer, work, seed, steps)
        resumed, before = last_checkpoint(work), time.time()
        method = nullcontext()
        if recipe.contexts:
            method = FocusedAttention.of(model)(model)
        elif "mem_freq" in recipe.config:
            method = LandmarkAttention.of(model)(model)
        with method:
            trainer.train(resume_from_checkpoint=resumed)
        seconds = time.time() - before
    command = (
        f"lcx zoo train {recipe.name}"
        + (f" --seed {seed}" if seed else "")
        + (f" --steps {steps}" if wanted else "")
    )
    losses = [[log["step"], round(log["loss"], 4)] for log in trainer.state.log_history if "loss" in log]
    card = {
        "name": recipe.name,
        "about": recipe.about,
        "data": recipe.data_about,
        "made_by": made_by(command, seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step
        * recipe.batch_size
        * trainer.train_dataset[0]["input_ids"].numel(),
        "seconds": None
        if resumed
        else round(seconds),  # a resumed training cannot say how long all of it took
        "recipe": {"batch_size": recipe.batch_size, "steps": steps, **recipe.training},
        "train_loss": losses,
    }
    save(recipe, model, tokenizer, card, out)
    shutil.rmtree(work, ignore_errors=True)
    return card


def save(recipe: Recipe, model, tokenizer, card: dict[str, Any], out: Path) -> None:
    """Write model, tokenizer and card to a folder beside `out`, score what was written, then rename it to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with staging(out.parent) as folder:
        # float16 halves the files. Nothing is lost that matters: the figures of the card are those of the files.
        model.config.use_cache = True  # Trainer turns it off, and generate reads it
        model.to("cpu", torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        size = sum(p.stat().st_size for p in folder.iterdir())
        if size > MAX_BYTES:
            raise LcxError(
                f"{recipe.name} takes {size / 1e6:.1f} MB, the zoo allows 4 MB: make the model smaller"
            )
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        card["heldout"] = recipe.score(written, tokenizer)
        if recipe.baselines:
            card["heldout"] |= recipe.baselines(tokenizer)
        card["sha256"] = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        card["made_by"]["date"] = datetime.now(UTC).date().isoformat()
        write_json(folder / "card.json", card)
        for path in folder.iterdir():
            path.chmod(0o644)
        out.mkdir(parents=True, exist_ok=True)
        # The card goes last: a folder with a card is complete.
        for path in sorted(folder.iterdir(), key=lambda p: p.name == "card.json"):
            os.replace(path, out / path.name)
