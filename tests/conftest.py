"""What the tests share: quick runs of the notebooks, the pages built from them, a browser, the counts at the end."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lcx.errors import LcxError
from lcx.run import execute, notebooks

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "pages" / "fixture.ipynb"
BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
COUNTS: dict[str, object] = {}


@functools.cache
def smoke_run(path: Path) -> Path | str:
    """The executed copy of a notebook (run once, kept by content), or the words of its failure."""
    out = ROOT / "_build" / "executed" / ("fixture" if path == FIXTURE else "smoke")
    try:
        return execute(path, "smoke", out_dir=out)
    except LcxError as e:
        return str(e)


def load_script(name: str):
    """A script of the folder book/ as a module."""
    spec = importlib.util.spec_from_file_location(f"book_{name}", ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Site:
    """The built pages: `html` their folder, `url` where they are served, `runs` the notebooks they show by stem."""

    def __init__(self, html: Path, url: str, runs: dict[str, Path]):
        self.html, self.url, self.runs = html, url, runs
        self.pages = sorted(
            p.relative_to(html).as_posix() for p in html.rglob("*.html") if "_static" not in p.parts
        )


@pytest.fixture(scope="session")
def site():
    """The whole book built from the smoke runs, with the test page of tests/pages/fixture.ipynb at its end."""
    runs = {p.stem: smoke_run(p) for p in (*notebooks(), FIXTURE)}
    failed = [r for r in runs.values() if isinstance(r, str)]
    if failed:
        pytest.fail("the pages cannot be built: " + "; ".join(failed), pytrace=False)
    build = load_script("build")
    began = time.perf_counter()
    source = build.stage(
        [r for n, r in runs.items() if n != FIXTURE.stem], ROOT / "_build/stage-test", [runs[FIXTURE.stem]]
    )
    try:
        html = build.pages(source, ROOT / "_build" / "test")
    except SystemExit as e:
        pytest.fail(str(e), pytrace=False)
    COUNTS["seconds to build the pages"] = round(time.perf_counter() - began)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    built = Site(html, f"http://127.0.0.1:{server.server_port}/", runs)
    COUNTS["pages"] = len(built.pages)
    yield built
    server.shutdown()


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for n in names if (found := shutil.which(n))), None)


def _start(playwright):
    """Start some Chromium: the machine's own, else Playwright's, else a downloaded one, else the Debian package."""
    tried = []
    for get in (lambda: None, _install_playwright, _install_debian):
        try:
            get()
            return playwright.chromium.launch(executable_path=find_chromium(), args=BROWSER_ARGS)
        except Exception as e:
            tried.append(str(e).strip().splitlines()[0])
    words = f"no Chromium found, and none could be installed ({'; '.join(tried)}): install chromium"
    if os.environ.get("CI"):
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def _install_playwright():
    subprocess.run(
        [sys.executable, "-m", "playwright", "install", "chromium"],
        check=True,
        capture_output=True,
        timeout=600,
    )


def _install_debian():
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise RuntimeError("not root, so apt-get was not tried")
    subprocess.run(
        "apt-get update -qq && apt-get install -y -qq chromium",
        shell=True,
        check=True,
        capture_output=True,
        timeout=900,
    )


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = _start(playwright)
        COUNTS["browser"] = f"Chromium {running.version}"
        yield running
        running.close()


def pytest_terminal_summary(terminalreporter):
    def ran(marker_path: str) -> int:
        done = (r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []))
        return sum(r.nodeid.startswith(marker_path) for r in done if getattr(r, "when", "") == "call")

    reports = [json.loads(p.read_text()) for p in (ROOT / "_build/executed/smoke").glob("*.json")]
    terminalreporter.section("counts")
    terminalreporter.write_line(
        f"notebooks: {len(notebooks())} ({sum(r['seconds'] for r in reports):.0f} s in the smoke profile)"
    )
    for folder in ("unit", "contracts", "colab", "notebooks", "pages"):
        terminalreporter.write_line(f"tests in {folder}: {ran(f'tests/{folder}/')}")
    for name, value in COUNTS.items():
        terminalreporter.write_line(f"{name}: {value}")
