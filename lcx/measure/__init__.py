"""Measurements too long for a notebook: `lcx measure NAME` makes book/results/NAME.json, `lcx.result(NAME)` reads it.

To add one, put a file in this folder with a function under `@measurement`:

    @measurement("smollm2-passkey", model="smollm2-135m", seed=0)
    def passkey_grid(model, tokenizer) -> dict:
        '''First line: what it measures, as `lcx measure --list` shows it.'''
        ...

It returns what JSON can hold; command, seed, versions, device, date, model and source of the weights are added. It must keep
finished parts in the cache (`kept(...)`), so that a killed run goes on where it stopped. Import heavy
libraries inside the function: the registry is also read only to list names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from ..errors import LcxError

registry: dict[str, Callable] = {}


def measurement(name: str, *, model: str | None, seed: int = 0) -> Callable:
    """Register a function (model, tokenizer) -> dict as the measurement `name` on `lcx.load(model)`.

    With model None it is called without arguments, and with gradients: it makes its own models.
    """

    def register(function: Callable) -> Callable:
        function.model, function.seed = model, seed
        registry[name] = function
        return function

    return register


def kept(name: str) -> Path:
    """A file in the cache for the finished parts of a measurement, still to be made."""
    from ..fetch import cache_dir

    return cache_dir() / "measure" / f"{name}.json"


def run(name: str) -> Path:
    """Make the result `name` and return the file it was written to. Raises LcxError for an unknown name."""
    import torch

    from ..models import load
    from ..results import made_by, results_dir, write_json

    if name not in registry:
        raise LcxError(f"no measurement {name!r}: have {', '.join(sorted(registry))}")
    function = registry[name]
    if function.model is None:
        about, data = {}, function()
    else:
        model, tokenizer = load(function.model)
        about = {"model": function.model, "source": model.lcx_source}
        with torch.inference_mode():
            data = function(model, tokenizer)
    made = made_by(f"lcx measure {name}", function.seed)
    return write_json(results_dir() / f"{name}.json", {"made_by": made, **about, **data})


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)
