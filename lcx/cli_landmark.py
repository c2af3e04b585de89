"""`lcx landmark …`: the weights that were released with the paper on Landmark Attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

landmark_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Landmark Attention's released weights.",
)


@landmark_app.callback()
def _landmark() -> None:
    pass  # with a callback, a single command keeps its name


@landmark_app.command()
def recover(
    base: Annotated[
        Path, typer.Argument(help="Folder of LLaMA-7B, in the format of transformers.", show_default=False)
    ],
    difference: Annotated[
        Path,
        typer.Argument(
            help="Folder of epfml/landmark-attention-llama7b-wdiff, downloaded.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder, of 27 GB.", show_default=False)],
    check: Annotated[bool, typer.Option(help="Compare the sum of the weights with the released one.")] = True,
) -> None:
    """Add the released difference to LLaMA-7B, which gives the Landmark LLaMA of the paper."""
    from .landmark_llama import recover as add

    print(f"{add(base, difference, out, check)}: load it with lcx.load, then LandmarkAttention.of(model)")
