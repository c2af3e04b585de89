"""Sphinx extension of the book: figures that move without a kernel, and pages that ask no other machine for anything.

`PlotlyRenderer` (entry point `myst_nb.mime_renderers`) writes the JSON of each figure into the page, with its
description. book/_static/lcx-figures.js draws it when it comes into view. plotly.js and MathJax are copied from their
Python packages, so neither a CDN nor Node.js is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html import escape
from importlib.metadata import distribution
from itertools import count
from pathlib import Path
from typing import Any

MIME = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
# What the page needs of MathJax: TeX in, HTML out. The whole package weighs 24 MB.
MATHJAX = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")
_ids = count()


class PlotlyRenderer:
    """MyST-NB plugin: a Plotly output becomes a `<figure>` that holds its JSON."""

    mime_priority_overrides = [("*", MIME, 5)]

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list | None:
        if inline or data.mime_type not in (MIME, WIDGET):
            return None
        from docutils import nodes

        if data.mime_type == WIDGET:
            renderer.logger.warning(
                "a widget does nothing on a page without a kernel: use lcx.figures.controls"
            )
            return []
        layout = data.content.get("layout", {})
        if not (layout.get("meta") or {}).get("alt"):
            renderer.logger.warning("a figure without a description: publish it with lcx.show(fig, alt=...)")
        return [nodes.raw(text=figure_html(data.content), format="html", classes=["output", "lcx-output"])]


def figure_html(spec: dict[str, Any]) -> str:
    """The figure as the page holds it: its description in words, and its JSON for the script to draw."""
    layout = spec.get("layout", {})
    alt = escape((layout.get("meta") or {}).get("alt", ""))
    # "<" is the one character that could end the script element early
    payload = json.dumps(spec, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    name = f"lcx-figure-{next(_ids)}"
    return (
        f'<figure class="lcx-figure" aria-labelledby="{name}"><div class="lcx-body">'
        f'<div class="lcx-plot" style="--lcx-height:{int(layout.get("height") or 420)}px"></div>'
        f'<figcaption class="lcx-caption" id="{name}">{alt}</figcaption></div>'
        f'<script type="application/json">{payload}</script></figure>'
    )


def _defaults(app: Any, config: Any) -> None:
    # sphinx-book-theme 1.3 with pydata 0.17 would add a second search bar and complain about the colour mode
    config.html_theme_options.setdefault("navbar_persistent", [])
    config.html_context.setdefault("default_mode", "auto")


def _page(app: Any, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    app.add_css_file("lcx.css")
    if 'class="lcx-figure"' in context.get("body", ""):
        app.add_js_file("lcx-figures.js", loading_method="defer")
    if "body" in context:  # a role that ARIA has withdrawn, on Sphinx's bibliography entries
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _no_thebe(app: Any, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    """Jupyter Book always loads sphinx-thebe, which wants a kernel from another site."""

    def foreign(script: Any) -> bool:
        return "thebe" in f"{getattr(script, 'filename', '')} {getattr(script, 'attributes', '')}".lower()

    for kind in ("script_files", "css_files"):
        context[kind] = [f for f in context.get(kind, []) if not foreign(f)]


def _assets(app: Any, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    import plotly

    static = Path(app.outdir) / "_static"
    _copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", static / "plotly.min.js")
    package = Path(
        distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    )
    for part in MATHJAX:
        _copy(package / part, static / "mathjax" / part)
    # The theme's icons are in a web font already; its second copy as a script weighs 1.5 MB on every page.
    for unused in (*static.glob("*thebe*"), *static.glob("scripts/fontawesome*")):
        unused.unlink()
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text()
        clean = re.sub(r"<script[^>]*fontawesome\.js[^>]*></script>", "", text)
        if clean != text:
            page.write_text(clean)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif not target.is_file() or target.stat().st_size != source.stat().st_size:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def setup(app: Any) -> dict[str, bool]:
    # what this file writes into pages counts as their source
    app.add_config_value("lcx_extension", hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "env")
    app.connect("config-inited", _defaults)
    app.connect("html-page-context", _page)
    app.connect("html-page-context", _no_thebe, priority=990)
    app.connect("build-finished", _assets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
