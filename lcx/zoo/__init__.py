"""Small LLaMA models trained by this package, each under 4 MB, each with a card that says how it was made.

    lcx zoo list | train NAME | verify NAME          (also `python -m lcx.zoo …`)

To add one, write a Recipe in lcx/zoo/recipes/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, LcxError, ModelNotFoundError
from ..fetch import check_sha256
from .recipes import Recipe, recipes

HERE = Path(__file__).parent


def names() -> list[str]:
    """The zoo's models, in the order of the book."""
    return list(recipes())


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ModelNotFoundError with the names that exist."""
    if name not in recipes():
        raise ModelNotFoundError(f"no zoo model {name!r}: use one of {', '.join(names())}")
    return recipes()[name]


def describe(name: str) -> str:
    """One line that says what the model is for."""
    return recipe(name).about


def folder(name: str) -> Path:
    """Where the checkpoint of a zoo model lies, or would lie once it is trained."""
    return HERE / recipe(name).name


def card(name: str) -> dict[str, Any]:
    """How the model was made and how well it does: command, seed, data, steps, losses, versions, device, sha256."""
    return _read_card(folder(name))


def _read_card(path: Path) -> dict[str, Any]:
    if not (path / "card.json").is_file():
        raise ModelNotFoundError(f"the zoo model {path.name} is not trained yet: `lcx zoo train {path.name}`")
    return json.loads((path / "card.json").read_text())


def train(
    name: str, out: str | Path | None = None, seed: int = 0, steps: int | None = None
) -> dict[str, Any]:
    """Train the model from its recipe into `out` (default: the zoo itself) and return its card.

    Checkpoints go to the cache; the same call after a kill continues from the last one and reaches the same weights.
    steps: fewer or more than the recipe says. Raises LcxError if steps is below 1.
    """
    from .training import run

    if steps is not None and steps < 1:
        raise LcxError(f"{steps} steps is not possible: use 1 or more")
    return run(recipe(name), Path(out) if out else HERE / name, seed, steps)


def check_files(path: Path) -> dict[str, Any]:
    """Compare the files of a zoo folder with the sha256 in its card. Returns the card.

    Raises ModelNotFoundError if there is no card, CorruptFileError if a file is missing or differs.
    """
    contents = _read_card(path)
    for file, digest in contents["sha256"].items():
        if not (path / file).is_file():
            raise CorruptFileError(f"{file} of {path.name} is missing: install the package again")
        check_sha256(path / file, digest, f"install the package again, or `lcx zoo train {path.name}`")
    return contents


def load(name: str, device: str | None = None, dtype=None):
    """(model in eval mode, tokenizer) of a zoo model, its files checked. The same as lcx.load(name)."""
    from ..models import load as load_model

    return load_model(recipe(name).name, device=device, dtype=dtype)


def verify(name: str, tolerance: float = 0.01) -> dict[str, float]:
    """Check the files against the card, compute the held-out figures again and return them.

    Raises CorruptFileError if a file differs, LcxError if the held-out loss is off by more than `tolerance` nats.
    """
    import torch

    contents = check_files(folder(name))
    model, tokenizer = load(name, device="cpu", dtype=torch.float32)
    figures = recipe(name).score(model, tokenizer)
    expected = contents["heldout"]["loss"]
    if abs(figures["loss"] - expected) > tolerance:
        raise LcxError(
            f"{name} has a held-out loss of {figures['loss']:.4f}, its card says {expected:.4f}: "
            "report it with the output of `lcx doctor`"
        )
    return figures
