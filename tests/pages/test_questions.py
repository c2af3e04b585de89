"""Predictions and quizzes on the page, with the keyboard alone and no kernel."""

from __future__ import annotations

import pytest

from lcx.run import notebooks

from .browse import draw_all, figures_of, opened

pytestmark = [pytest.mark.page, pytest.mark.slow]
FIXTURE = "notebooks/fixture.html"
CHAPTERS = [p.stem for p in notebooks()]
SHAPES = "f => (f.querySelector('.lcx-plot').layout.shapes || []).filter((s) => s.name === 'guess').map((s) => [s.x0, s.y0, s.label.text])"


def predictions(page):
    return page.locator(".lcx-figure:has(.lcx-predict)")


def test_predict_by_keyboard(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = predictions(page).first
        assert not figure.locator(".lcx-plot").is_visible(), (
            "the figure is covered until the reader has guessed"
        )
        assert not figure.locator(".lcx-caption").is_visible(), "the description would give the answer away"
        figure.locator("input").focus()
        page.keyboard.press("End")
        assert (
            figure.locator("output").inner_text() == "130,000 tokens"
            or "131" in figure.locator("output").inner_text()
        )
        page.keyboard.press("Home")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        guess = figure.locator("output").inner_text()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_function("f => f.dataset.ready", arg=figure.element_handle())
        words = figure.locator(".lcx-verdict").inner_text()
        assert "The answer is 4,096 tokens." in words and f"You guessed {guess}" in words
        assert figure.locator(".lcx-plot").is_visible() and figure.locator(".lcx-caption").is_visible()
        [[x, _, label]] = figure.evaluate(SHAPES)
        assert label == f"your guess: {guess}" and 1024 <= x < 1200
        line = figure.locator(".shapelayer path").bounding_box()
        box = figure.locator(".lcx-plot").bounding_box()
        assert box["x"] < line["x"] < box["x"] + box["width"] / 3, (
            "the line stands where the guess is on a log axis"
        )


def test_predict_on_a_linear_axis(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = predictions(page).nth(1)
        figure.locator("input").focus()
        page.keyboard.press("Home")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_function("f => f.dataset.ready", arg=figure.element_handle())
        assert (
            figure.locator(".lcx-verdict").inner_text()
            == "The answer is 70 %. You guessed 0 %: 70 % too low."
        )
        assert figure.evaluate(SHAPES)[0][1] == 0


def test_predict_can_be_skipped(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = predictions(page).first
        figure.get_by_role("button", name="Skip the guess").focus()
        page.keyboard.press("Enter")
        page.wait_for_function("f => f.dataset.ready", arg=figure.element_handle())
        assert figure.locator(".lcx-verdict").inner_text() == "The answer is 4,096 tokens."
        assert figure.evaluate(SHAPES) == []


@pytest.mark.parametrize("stem", CHAPTERS)
def test_predictions_of_the_chapter(site, browser, stem):
    specs = [s for s in figures_of(site.runs[stem]) if "predict" in s["layout"]["meta"]]
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        covered = predictions(page)
        assert covered.count() == len(specs) >= 1
        for i, spec in enumerate(specs):
            p = spec["layout"]["meta"]["predict"]
            figure = covered.nth(i)
            assert figure.locator(".lcx-question").inner_text() == p["question"]
            figure.get_by_role("button", name="Show the answer").click()
            page.wait_for_function("f => f.dataset.ready", arg=figure.element_handle())
            assert "You guessed" in figure.locator(".lcx-verdict").inner_text()
            assert len(figure.evaluate(SHAPES)) == 1
            assert p["low"] <= p["truth"] <= p["high"], "the slider cannot reach the answer"
        assert draw_all(page) == 0


@pytest.mark.parametrize("stem", [*CHAPTERS, "fixture"])
def test_quiz_by_keyboard(site, browser, stem):
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        quizzes = page.locator(".lcx-quiz")
        assert quizzes.count() >= (1 if stem == "fixture" else 3)
        for i in range(quizzes.count()):
            choices = quizzes.nth(i).locator("details")
            for k in range(choices.count()):
                why = choices.nth(k).locator("div")
                assert not why.is_visible()
                choices.nth(k).locator("summary").focus()
                page.keyboard.press("Enter")
                assert why.is_visible() and len(why.inner_text()) > 15
        assert not page.noted["errors"]
