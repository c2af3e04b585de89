"""lcx: how a language model is given a longer memory. The small package behind the book.

Everything public is importable from here. Names load on first use, so `import lcx` does not pay for torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> module that defines it
_HOME = {
    "LcxError": "errors",
    "UnsupportedModelError": "errors",
    "profile": "profiles",
    "Profile": "profiles",
    "PROFILES": "profiles",
    "show": "figures",
    "Predict": "figures",
    "check": "exercises",
    "quiz": "exercises",
    "load": "models",
    "text": "corpora",
    "result": "results",
    "cream_positions": "methods.cream",
    "pose_positions": "methods.cream",
    "randpos_positions": "methods.cream",
    "longrecipe_positions": "methods.cream",
    "coverage": "methods.coverage",
    "scale_rope": "methods.scaling",
    "PositionLabels": "finetune_cream",
    "selfextend_distances": "methods.selfextend",
    "selfextend_attention": "methods.selfextend",
    "SelfExtend": "selfextend",
    "crossbatch_schedule": "methods.focused",
    "crossbatch_contexts": "methods.focused",
    "lane_contexts": "methods.focused",
    "crossbatch_attention": "methods.focused",
    "positive_share": "methods.focused",
    "FocusedAttention": "focused",
    "grouped_softmax": "methods.landmark",
    "landmark_attention": "methods.landmark",
    "insert_landmarks": "landmark_tokens",
    "add_landmark": "landmark_tokens",
    "LandmarkAttention": "landmark",
    "Memory": "memory",
}
_MODULES = (
    "corpora",
    "errors",
    "exercises",
    "figures",
    "longllama",
    "methods",
    "models",
    "plan",
    "profiles",
    "results",
    "tasks",
    "zoo",
)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'lcx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
