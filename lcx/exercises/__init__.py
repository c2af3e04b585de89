"""Exercises that check themselves, and quizzes that need no kernel.

A check is a function registered with `@exercise("01-kv-bytes")`; it asserts, and the first message that fails is what
the student sees. A quiz is plain HTML: each choice opens its explanation, with the keyboard too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..errors import LcxError

_CHECKS: dict[str, Callable[[Any], None]] = {}


def exercise(name: str) -> Callable:
    """Register the decorated function as the check of exercise `name` (chapter number first: "01-kv-bytes")."""

    def register(fn: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in _CHECKS:
            raise ValueError(f"two exercises are called {name!r}")
        _CHECKS[name] = fn
        return fn

    return register


def checks() -> dict[str, Callable[[Any], None]]:
    """Every registered check by name; loads the files of this folder."""
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")
    return _CHECKS


def check(name: str, answer: Any) -> bool:
    """Check a student's answer (a function or a value), say at once whether it holds, and return that.

    Never raises for a wrong answer, so that "run all" goes on. Raises LcxError for an unknown exercise.
    """
    known = checks()
    if name not in known:
        raise LcxError(f"no exercise {name!r}: this chapter has {', '.join(sorted(k for k in known if k[:2] == name[:2])) or 'none'}")
    try:
        known[name](answer)
        passed, words = True, "Right. Your answer passed every check."
    except AssertionError as e:
        passed, words = False, f"Not yet: {e or 'the result is not the expected one'}"
    except Exception as e:  # the student's own code failed: show how, and go on
        passed, words = False, f"Not yet: your code raised {type(e).__name__}: {e}"
    mark = "✓" if passed else "✗"
    html = (
        f'<div class="lcx-card lcx-{"pass" if passed else "fail"}" role="status" style="border-left:4px solid '
        f'{"#009E73" if passed else "#D55E00"};padding:.4em .8em">{mark} <b>{escape(name)}</b> {escape(words)}</div>'
    )
    _display(html, f"{mark} {name}: {words}", {"check": name, "passed": passed})
    return passed


def quiz(question: str, choices: Sequence[tuple[str, bool, str]]) -> None:
    """Show a question whose every choice opens its own explanation.

    choices: (text, is it right, why) for each; at least one right, and each needs its explanation.
    Raises ValueError otherwise.
    """
    if not any(right for _, right, _ in choices) or not all(why.strip() for *_, why in choices):
        raise ValueError("a quiz needs at least one right choice, and an explanation for every choice")
    rows = "".join(
        f'<details class="lcx-choice lcx-{"right" if right else "wrong"}" style="margin:.3em 0"><summary>{escape(text)}</summary>'
        f'<div style="padding:.3em 1.2em"><b>{"✓ Right." if right else "✗ No."}</b> {escape(why)}</div></details>'
        for text, right, why in choices
    )
    html = f'<div class="lcx-card lcx-quiz" role="group" aria-label="Quiz" style="border-left:4px solid #0072B2;padding:.4em .8em"><p><b>{escape(question)}</b></p>{rows}</div>'
    plain = "\n".join([f"Quiz: {question}", *(f"  - {text}" for text, *_ in choices)])
    _display(html, plain, {"quiz": question})


def _display(html: str, plain: str, meta: dict[str, Any]) -> None:
    from IPython.display import display

    display({"text/html": html, "text/plain": plain}, raw=True, metadata={"lcx": meta})
