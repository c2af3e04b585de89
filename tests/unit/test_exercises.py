"""Checks tell right from wrong without ever stopping a notebook; quizzes explain every choice."""

from __future__ import annotations

import re

import pytest

import lcx
from lcx import exercises


@pytest.fixture
def outputs(monkeypatch):
    import IPython.display

    seen = []
    monkeypatch.setattr(
        IPython.display, "display", lambda data, metadata=None, **kw: seen.append((data, metadata))
    )
    return seen


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(exercises, "_CHECKS", dict(exercises.checks()))

    @exercises.exercise("99-double")
    def _(answer):
        assert answer(3) == 6, "double(3) should be 6"

    return "99-double"


@pytest.mark.parametrize(
    "answer, passed, words",
    [
        (lambda x: 2 * x, True, "passed every check"),
        (lambda x: x + 2, False, "Not yet: double(3) should be 6"),
        (lambda x: x[..., 0] if x > 9 else x, False, "Not yet: double(3) should be 6"),
        (lambda x: ..., False, "Your turn."),
        (..., False, "Your turn."),
        (lambda x: 1 / 0, False, "your code raised ZeroDivisionError: division by zero"),
        (None, False, "your code raised TypeError"),
    ],
)
def test_check(outputs, double, answer, passed, words):
    assert lcx.check(double, answer) is None  # a cell that ends with it shows the card alone
    [(data, metadata)] = outputs
    assert metadata == {"lcx": {"check": double, "passed": passed}}
    assert words in data["text/plain"] and words.replace("'", "&#x27;") in data["text/html"]
    assert 'class="lcx-card' in data["text/html"]


def test_what_a_student_writes_is_escaped(outputs, double):
    def bad(x):
        raise ValueError("<script>")

    lcx.check(double, bad)
    assert "<script>" not in outputs[0][0]["text/html"]


def test_unknown_exercise_names_those_of_the_chapter():
    with pytest.raises(lcx.LcxError, match="no exercise '77-nothing': this chapter has none"):
        lcx.check("77-nothing", 1)
    with pytest.raises(lcx.LcxError, match="01-"):
        lcx.check("01-nothing", 1)


def test_two_exercises_of_one_name_are_refused(double):
    with pytest.raises(ValueError, match=double):
        exercises.exercise(double)(print)


def test_every_check_fails_on_a_stub():
    """What the committed stubs return, nothing at all, and constants pass no check."""
    known = exercises.checks()
    assert known
    for name, check in known.items():
        assert re.fullmatch(r"\d\d-[a-z0-9-]+", name)
        for stub in (lambda *a, **k: ..., lambda *a, **k: None, ..., None):
            with pytest.raises(Exception):  # noqa: B017  any failure will do
                check(stub)


def test_quiz_explains_every_choice(outputs):
    lcx.quiz("Is 1 < 2?", [("Yes", True, "Because 1 & 2."), ("No", False, "It is.")])
    [(data, metadata)] = outputs
    assert metadata == {"lcx": {"quiz": "Is 1 < 2?"}}
    html = data["text/html"]
    assert html.count("<details") == 2 and html.count("lcx-right") == 1 and html.count("lcx-wrong") == 1
    assert "Is 1 &lt; 2?" in html and "1 &amp; 2" in html and "Yes" in data["text/plain"]


@pytest.mark.parametrize("choices", [[], [("a", False, "why")], [("a", True, "why"), ("b", False, " ")]])
def test_quiz_refuses(choices):
    with pytest.raises(ValueError, match="right choice"):
        lcx.quiz("?", choices)
