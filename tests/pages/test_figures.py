"""Figures on the page: the data of the notebook, moved by native controls to exactly the values computed for them."""

from __future__ import annotations

import json
import re

import pytest

from lcx.run import notebooks

from .browse import STATE, differences, draw_all, figures_of, opened

pytestmark = [pytest.mark.page, pytest.mark.slow]
CHAPTERS = [p.stem for p in notebooks()]
FIXTURE = "notebooks/fixture.html"


def ready(page, index: int):
    """The figure at `index`, uncovered and drawn."""
    figure = page.locator(".lcx-figure").nth(index)
    skip = figure.locator(".lcx-predict .lcx-quiet")
    if skip.count():
        skip.click()
    figure.scroll_into_view_if_needed()
    page.wait_for_function("f => f.dataset.ready", arg=figure.element_handle())
    return figure


def settle(page, figure, at: list[int], timeout: int = 10_000):
    page.wait_for_function(
        "([f, s]) => f.dataset.state === s",
        arg=[figure.element_handle(), ".".join(map(str, at))],
        timeout=timeout,
    )


@pytest.mark.parametrize("stem", [*CHAPTERS, "fixture"])
def test_page_holds_the_figures_of_the_run(site, stem):
    """The JSON on the page is that of the executed notebook, and its description is there to read."""
    text = (site.html / "notebooks" / f"{stem}.html").read_text()
    specs = [
        json.loads(s)
        for s in re.findall(r'<script type="application/json">(.*?)</script></figure>', text, re.S)
    ]
    assert specs and specs == figures_of(site.runs[stem])
    captions = re.findall(r'<figcaption class="lcx-caption"[^>]*>(.*?)</figcaption>', text, re.S)
    assert len(captions) == len(specs) and all(len(c) >= 20 for c in captions)


@pytest.mark.parametrize("stem", [*CHAPTERS, "fixture"])
def test_every_control_moves_its_figure(site, browser, stem):
    specs = figures_of(site.runs[stem])
    moved = 0
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        for index, spec in enumerate(specs):
            controls = spec["layout"]["meta"].get("controls", [])
            if not controls:
                continue
            figure = ready(page, index)
            at = [c["start"] for c in controls]
            assert not differences(page, figure, spec, at), f"figure {index} at its start"
            inputs = figure.locator(".lcx-body .lcx-controls :is(input, select)")
            assert inputs.count() == len(controls)
            assert not figure.locator(".slider-container, .updatemenu-container").count()
            for i, control in enumerate(controls):
                last = len(control["values"]) - 1
                at[i] = last if control["start"] != last else 0
                inputs.nth(i).focus()
                page.keyboard.press("End" if at[i] else "Home")
                settle(page, figure, at)
                assert not differences(page, figure, spec, at), (
                    f"figure {index}, {control['name']} at {control['values'][at[i]]}"
                )
                if control["kind"] == "slider":
                    assert (
                        figure.locator("output")
                        .nth(sum(c["kind"] == "slider" for c in controls[:i]))
                        .inner_text()
                        == control["values"][at[i]]
                    )
                    assert inputs.nth(i).get_attribute("aria-valuetext") == control["values"][at[i]]
                moved += 1
        assert not page.noted["errors"]
    assert moved, "no figure of this page has controls"


@pytest.mark.parametrize("stem", [*CHAPTERS, "fixture"])
def test_play_walks_to_the_end(site, browser, stem):
    specs = figures_of(site.runs[stem])
    playing = [i for i, s in enumerate(specs) if s["layout"]["meta"].get("play")]
    if not playing:
        assert stem != "fixture"
        pytest.skip("no figure of this chapter plays")
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        index, spec = playing[0], specs[playing[0]]
        figure = ready(page, index)
        controls = spec["layout"]["meta"]["controls"]
        at = [len(controls[0]["values"]) - 1, *(c["start"] for c in controls[1:])]
        button = figure.get_by_role("button", name="Play")
        button.focus()
        page.keyboard.press("Enter")
        settle(page, figure, at, timeout=3_000 + 1_500 * len(controls[0]["values"]))
        assert not differences(page, figure, spec, at)
        assert figure.get_by_role("button", name="Play").count() == 1


def test_known_values(site, browser):
    """The fixture's numbers written out, independent of the frames."""
    with opened(browser, site, FIXTURE) as page:
        figure = ready(page, 0)
        assert figure.evaluate(STATE)["data"][0]["y"] == [2 * v for v in range(10)]
        figure.locator("input").first.focus()
        page.keyboard.press("ArrowRight")
        figure.locator("select").select_option("square")
        settle(page, figure, [2, 1])
        data = figure.evaluate(STATE)["data"]
        assert data[0]["y"] == [3 * v * v for v in range(10)] and data[1]["y"] == [0] * 10
        mask = ready(page, 1)
        for index, window in enumerate([1, 4, 8, 12]):
            mask.locator("input").first.fill(str(index))
            settle(page, mask, [index])
            assert sum(map(sum, mask.evaluate(STATE)["data"][0]["z"])) == sum(
                min(window, q + 1) for q in range(12)
            )


def test_play_pauses_and_moves_only_on_request_when_motion_is_reduced(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = ready(page, 1)
        button = figure.locator("button")
        button.click()
        assert button.inner_text() == "Pause"
        button.click()
        assert button.inner_text() == "Play"
        held = figure.get_attribute("data-state")
        page.wait_for_timeout(1500)
        assert figure.get_attribute("data-state") == held
    with opened(browser, site, FIXTURE, reduced_motion="reduce") as page:
        figure = ready(page, 1)
        figure.get_by_role("button", name="Next step").click()
        settle(page, figure, [1])
        page.wait_for_timeout(1500)
        assert figure.get_attribute("data-state") == "1"


CONTRAST = """(figure) => {
  const rgb = (s) => s.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (s) => rgb(s).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  // labels of the axes first: numbers written into the cells of a heat map take their colour from the cell
  const label = figure.querySelector(".xtick text, .ytick text") ?? figure.querySelector(".lcx-plot text");
  const text = getComputedStyle(label).fill;
  const page = getComputedStyle(document.body).backgroundColor;
  const [a, b] = [light(text), light(page)].sort((p, q) => q - p);
  return { text, ratio: (a + 0.05) / (b + 0.05), filled: getComputedStyle(figure.querySelector(".main-svg")).backgroundColor };
}"""


@pytest.mark.parametrize("stem", [*CHAPTERS, "fixture"])
def test_colours_follow_the_theme(site, browser, stem):
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        assert draw_all(page) == 0
        figures = page.locator(".lcx-figure")
        for index in range(figures.count()):
            figure, seen = figures.nth(index), {}
            for theme in ("light", "dark"):
                page.evaluate("t => document.documentElement.dataset.theme = t", theme)
                page.wait_for_timeout(400)
                seen[theme] = figure.evaluate(CONTRAST)
                assert seen[theme]["ratio"] >= 4.5, (index, theme, seen)
                assert seen[theme]["filled"] in ("rgba(0, 0, 0, 0)", "transparent")
            assert seen["light"]["text"] != seen["dark"]["text"]
            page.evaluate("document.documentElement.dataset.theme = 'light'")
            page.wait_for_timeout(300)


def test_theme_button_repaints(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = ready(page, 0)
        before = figure.evaluate(CONTRAST)["text"]
        for _ in range(3):  # auto, light, dark
            if page.evaluate("document.documentElement.dataset.theme") == "dark":
                break
            page.locator(".theme-switch-button:visible").first.click()
        page.wait_for_timeout(800)
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert figure.evaluate(CONTRAST)["text"] != before


def test_data_table_opens_and_follows(site, browser):
    with opened(browser, site, FIXTURE) as page:
        figure = ready(page, 0)
        figure.locator("summary").focus()
        page.keyboard.press("Enter")
        rows = figure.locator(".lcx-tables tbody tr")
        rows.first.wait_for()
        assert figure.locator("thead th").all_inner_texts() == ["position (tokens)", "moving", "still"]
        assert rows.nth(9).locator("th, td").all_inner_texts() == ["9", "18", "0"]
        figure.locator("input").first.fill("2")
        settle(page, figure, [2, 0])
        page.wait_for_timeout(200)
        assert rows.nth(9).locator("th, td").all_inner_texts() == ["9", "27", "0"]
        mask = ready(page, 1)
        mask.locator("summary").click()
        mask.locator("tbody tr").first.wait_for()
        assert mask.locator("tbody tr").count() == 12


@pytest.mark.parametrize("stem", CHAPTERS)
def test_every_figure_has_a_table_with_data(site, browser, stem):
    with opened(browser, site, f"notebooks/{stem}.html") as page:
        draw_all(page)
        page.evaluate("document.querySelectorAll('.lcx-data').forEach((d) => { d.open = true; })")
        page.wait_for_timeout(500)
        counts = page.locator(".lcx-tables").evaluate_all(
            "all => all.map((t) => t.querySelectorAll('tbody tr').length)"
        )
        assert counts and min(counts) > 0, counts


def test_without_scripts_the_description_is_there(site, browser):
    with opened(browser, site, FIXTURE, java_script_enabled=False) as page:
        captions = page.locator(".lcx-caption")
        assert captions.count() == 4
        assert all(captions.nth(i).is_visible() for i in range(4))
