"""The command `lcx`. Every error a user can mend is one red line on stderr and exit code 1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .cli_landmark import landmark_app
from .cli_train import train_app
from .errors import LcxError

# torch and transformers take seconds to import, so each command imports what it needs itself.
_OPTIONS = {
    "no_args_is_help": True,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(**_OPTIONS, pretty_exceptions_enable=False, add_completion=False)
zoo_app = typer.Typer(**_OPTIONS, help="The small models that come with the package: list, train, verify.")
app.add_typer(zoo_app, name="zoo")
app.add_typer(train_app, name="train")
app.add_typer(landmark_app, name="landmark")
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lcx {__version__}")
        raise typer.Exit()


@app.callback()
def _lcx(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How a language model is given a longer memory: the commands behind the book."""
    global _debug
    _debug = debug


@app.command()
def doctor() -> None:
    """Say what is installed, cached and missing, and how to mend it. Ready to paste in an issue."""
    from .doctor import examine

    report, broken = examine()
    print(report)
    if broken:
        raise typer.Exit(1)


@app.command()
def run(
    notebook: Annotated[
        str, typer.Argument(help="A path, a file name, or its start: [bold]02[/bold].", show_default=False)
    ],
    profile: Annotated[
        str, typer.Option("--profile", "-p", help="How much to compute: auto, smoke, book, colab or full.")
    ] = "book",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the executed copy.", show_default="_build/executed/PROFILE"
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option(help="Keep an earlier run when nothing it depends on has changed.")
    ] = True,
    receipt: Annotated[
        bool, typer.Option("--receipt", help="Record time and memory for the badge row.")
    ] = False,
) -> None:
    """Run a notebook from start to end and print the path of the executed copy."""
    from .run import execute

    print(execute(notebook, profile=profile, out_dir=out, use_cache=cache, receipt=receipt))


@app.command()
def measure(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which results to make.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--list", "-l", help="List the results that can be made.")] = False,
) -> None:
    """Make the measured results that the book reads (book/results)."""
    from . import measure as m

    if every or not names:
        from rich.table import Table

        table = Table("result", "what it measures")
        for name, fn in sorted(m.registry.items()):
            table.add_row(name, _first_line(fn.__doc__))
        return _print(table)
    unknown = [name for name in names if name not in m.registry]
    if unknown:
        raise LcxError(f"no measurement {unknown[0]!r}: have {', '.join(sorted(m.registry))}")
    for name in names:
        print(m.run(name))


@zoo_app.command("list")
def zoo_list() -> None:
    """List the models: what each is, its size, and whether its checkpoint is there."""
    from rich.table import Table

    from .doctor import zoo_rows

    table = Table("name", "checkpoint", "what it is")
    for row in zoo_rows():
        table.add_row(*row)
    _print(table)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="A name from [bold]lcx zoo list[/bold].", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="the recipe's")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to.", show_default="the zoo")
    ] = None,
) -> None:
    """Train a model by its recipe and write its checkpoint and card. Interrupted training resumes."""
    from . import zoo

    _print(zoo.train(name, out=out, seed=seed, steps=steps)["heldout"])


@zoo_app.command("verify")
def zoo_verify(
    names: Annotated[list[str] | None, typer.Argument(help="Which models.", show_default="all")] = None,
) -> None:
    """Check each checkpoint against its card: the files, then the held-out figures, computed again."""
    from . import zoo

    for name in names or zoo.names():
        figures = zoo.verify(name)
        print(f"{name}: files and figures agree with the card, held-out loss {figures['loss']:.4f} nats")


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


def _print(renderable: object) -> None:
    from rich.console import Console

    Console().print(renderable)


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(" ".join(f"error: {message}".split()), style="red"))
    sys.exit(1)


def main() -> None:
    """Entry point of the command `lcx` and of `python -m lcx`."""
    try:
        app(prog_name="lcx")
    except (LcxError, ModuleNotFoundError, OSError) as e:
        if _debug:
            raise
        if isinstance(e, LcxError):
            _fail(str(e))
        if isinstance(e, ModuleNotFoundError):
            _fail(
                f"the package {e.name} is missing: `lcx doctor` lists what is missing and how to install it"
            )
        _fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''} (`lcx --debug …` shows where)")
