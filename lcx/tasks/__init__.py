"""The tasks a long-context model is measured on, one file each.

A retrieval task is a module with one pure function `sample(tokenizer, *, length, depth, seed, ablate, ...) -> Sample`:
the same arguments give the same tokens, and a prompt asked to be `length` tokens long, answer included, is exactly that
long. `passkey`, `key_value`, `lines` and `needle_grid` work with any tokenizer; `needle_copy` is a task on bare token
ids for models trained from scratch; `perplexity` reads text by position.
"""

from __future__ import annotations

import importlib

from .sample import Sample

_MODULES = ("key_value", "lines", "needle_copy", "needle_grid", "passkey", "perplexity")

__all__ = ["Sample", *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'lcx.tasks' has no attribute {name!r}")
