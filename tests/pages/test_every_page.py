"""What holds for every page of the book, on a desktop and a phone, light and dark."""

from __future__ import annotations

import gzip
from html.parser import HTMLParser
from pathlib import PurePosixPath
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from tests.conftest import ROOT, load_script

from .browse import axe, draw_all, opened

pytestmark = [pytest.mark.page, pytest.mark.slow]
MAX_BYTES = 1_500_000


@pytest.fixture(scope="module")
def visits(site, browser):
    """Every page seen in light and dark, 1400 and 400 pixels wide; what was noted, by page."""
    notes = {}
    for path in (p for p in site.pages if p != "index.html"):  # which only sends the reader on
        note = notes[path] = {
            "foreign": [],
            "errors": [],
            "missing": [],
            "wide": [],
            "axe": [],
            "empty": 0,
            "bytes": {},
        }
        for theme in ("light", "dark"):
            with opened(browser, site, path, theme=theme) as page:
                note["empty"] += draw_all(page)
                page.wait_for_timeout(300)
                note["bytes"] = weight(site, page.noted["loaded"])
                if page.evaluate("document.documentElement.dataset.theme") != theme:
                    note["errors"].append(f"the page is not {theme}")
                for width in (1400, 400):
                    page.set_viewport_size({"width": width, "height": 900})
                    page.wait_for_timeout(200)
                    note["axe"] += [f"{theme}, {width} px: {v}" for v in axe(page)]
                    scroll = page.evaluate("document.documentElement.scrollWidth")
                    if scroll > width:
                        note["wide"].append(f"{theme}: {scroll} pixels on a window of {width}")
                for kind in ("foreign", "errors", "missing"):
                    note[kind] += page.noted[kind]
    return notes


def faults(visits, kind: str) -> str:
    return "\n".join(f"{path}: {line}" for path, note in visits.items() for line in note[kind])


def test_every_page_of_the_contents_is_built(site):
    toc = load_script("build").yaml.safe_load((ROOT / "book/_toc.yml").read_text())
    wanted = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    assert {f"{w}.html" for w in wanted} <= set(site.pages)


def test_front_door_leads_to_the_book(site, browser):
    with opened(browser, site, "index.html") as page:
        page.wait_for_url(site.url + "book/index.html")
        assert not page.noted["foreign"]


def test_no_request_leaves_the_machine(visits):
    assert not faults(visits, "foreign")


def test_no_script_fails_and_no_file_is_missing(visits):
    assert not faults(visits, "errors") + faults(visits, "missing")


def test_every_figure_is_drawn(visits):
    assert not [path for path, note in visits.items() if note["empty"]]


def test_nothing_is_wider_than_the_window(visits):
    assert not faults(visits, "wide")


def test_axe_finds_nothing_serious(visits):
    assert not faults(visits, "axe")


def weight(site, urls: list[str]) -> dict[str, int]:
    """Bytes by file of what a page loads but the shared plotly.js, compressed as servers send it."""
    names = {url.removeprefix(site.url).split("?")[0] for url in urls} - {"_static/plotly.min.js"}
    files = {n: site.html / n for n in names if (site.html / n).is_file()}
    return {n: min(f.stat().st_size, len(gzip.compress(f.read_bytes(), 6))) for n, f in files.items()}


def test_pages_are_light(site, visits):
    for path, note in visits.items():
        assert (site.html / path).stat().st_size <= MAX_BYTES, f"{path} itself, unpacked"
        total = sum(note["bytes"].values())
        assert 50_000 < total <= MAX_BYTES, f"{path} loads {total:,} bytes: {note['bytes']}"


class _Links(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links |= {attrs[k] for k in ("href", "src") if attrs.get(k)}


def test_no_internal_link_is_dead(site):
    pages = {p: _Links((site.html / p).read_text()) for p in site.pages}
    dead, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            parts: list[str] = list(PurePosixPath(path).parent.parts) if target else [path]
            for part in PurePosixPath(unquote(urlsplit(target).path)).parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            goal = "/".join(parts)
            seen += 1
            if not (site.html / goal).is_file():
                dead.append(f"{path} -> {link}")
            elif fragment and goal in pages and unquote(fragment) not in pages[goal].ids:
                dead.append(f"{path} -> {link} (no such place on the page)")
    assert seen > 50
    assert not dead, "\n".join(sorted(dead))


def test_search_works_without_a_server(site, browser):
    with opened(browser, site, "search.html?q=attention") as page:
        page.wait_for_selector("#search-results li a", timeout=15_000)
        assert page.locator("#search-results li").count() >= 2
        assert not page.noted["foreign"]
