"""Exercises that check themselves, and quizzes that need no kernel.

A check is a function registered with `@exercise("01-kv-bytes")`; it asserts, and the first message that fails is what
the student sees. A quiz is plain HTML: each choice opens its explanation, with the keyboard too.
"""

from __future__ import annotations

import dis
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


def check(name: str, answer: Any) -> None:
    """Check a student's answer (a function or a value) and say at once whether it holds.

    Never raises for a wrong answer, so that "run all" goes on. Raises LcxError for an unknown exercise.
    """
    known = checks()
    if name not in known:
        raise LcxError(
            f"no exercise {name!r}: this chapter has {', '.join(sorted(k for k in known if k[:2] == name[:2])) or 'none'}"
        )
    passed, mark, color = False, "✗", "#D55E00"
    try:
        known[name](answer)
        passed, mark, color, words = True, "✓", "#009E73", "Right. Your answer passed every check."
    except AssertionError as e:
        words = f"Not yet: {e or 'the result is not the expected one'}"
    except Exception as e:  # the student's own code failed: show how, and go on
        words = f"Not yet: your code raised {type(e).__name__}: {e}"
    if not passed and _untouched(answer):
        mark, color, words = (
            "○",
            "#8C8C8C",
            "Your turn. Put your answer in place of the dots and run this cell again.",
        )
    html = (
        f'<div class="lcx-card lcx-{"pass" if passed else "fail"}" role="status" style="border-left:4px solid '
        f'{color};padding:.4em .8em">{mark} <b>{escape(name)}</b> {escape(words)}</div>'
    )
    _display(html, f"{mark} {name}: {words}", {"check": name, "passed": passed})


def _untouched(answer: Any) -> bool:
    """Is this still the stub: `...`, or a function that returns `...`?"""
    if not hasattr(answer, "__code__"):
        return answer is ...
    steps = list(dis.get_instructions(answer.__code__))
    returns = ("RETURN_VALUE", "RETURN_CONST")  # two instructions up to Python 3.11, one from 3.12 on
    return any(
        a.argval is ... and {a.opname, b.opname} & set(returns)
        for a, b in zip(steps, [*steps[1:], steps[-1]], strict=True)
    )


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
