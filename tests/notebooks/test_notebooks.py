"""Every chapter runs in the smoke profile, and has the anatomy that the book promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lcx.run import notebooks
from tests.conftest import ROOT, load_script, smoke_run

HEADINGS = [
    "Why",
    "You will be able to",
    "Predict",
    "Build it by hand",
    "Put it in a real model",
    "Play",
    "Break it",
    "Measure",
    "Exercises",
    "Quiz",
    "Take away",
    "Paper and us",
    "References",
]
PLOTLY = "application/vnd.plotly.v1+json"
SMOKE_SECONDS = 40

every = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)


def cells(path: Path, tag: str | None = None, kind: str | None = None) -> list:
    nb = nbformat.read(path, as_version=4)
    return [
        c
        for c in nb.cells
        if (tag is None or tag in c.metadata.get("tags", [])) and kind in (None, c.cell_type)
    ]


def run_of(path: Path) -> Path:
    run = smoke_run(path)
    if isinstance(run, str):
        pytest.fail(run, pytrace=False)
    return run


def facts(cell) -> list[dict]:
    """What lcx.check and lcx.quiz left in the metadata of a cell's outputs."""
    return [o["metadata"]["lcx"] for o in cell.get("outputs", []) if o.get("metadata", {}).get("lcx")]


def section(path: Path, heading: str) -> list:
    """The cells from a `##` heading up to the next one, of the executed notebook."""
    inside, found = False, []
    for cell in cells(path):
        heads = re.findall(r"^## (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        inside = heads[-1].strip() == heading if heads else inside
        found += [cell] if inside else []
    return found


def test_there_are_notebooks_and_nothing_else():
    files = {p.name for p in (ROOT / "notebooks").iterdir() if not p.name.startswith(".")}
    assert files and files == {p.name for p in notebooks()}


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_runs_from_start_to_end(path):
    run = run_of(path)
    record = json.loads(run.with_suffix(".json").read_text())
    cpu = record["cpu_seconds"] or record["seconds"]
    print(f"{path.stem}: {record['seconds']} s, {cpu} s of CPU time")
    # CPU time, since the wall clock of a busy machine says nothing: two cores for 40 s
    assert cpu <= 2 * SMOKE_SECONDS


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_outputs_are_clean(path):
    """No traceback, no warning, and nothing that needs a kernel."""
    for cell in cells(run_of(path), kind="code"):
        for out in cell.outputs:
            assert out.output_type != "error"
            assert out.get("name") != "stderr", (
                f"stderr in {cell.source.splitlines()[0]!r}: {out.get('text', '')[:300]}"
            )
            assert "application/vnd.jupyter.widget-view+json" not in out.get("data", {})


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_figures_are_described_and_light(path):
    figures = [
        o["data"][PLOTLY]
        for c in cells(run_of(path), kind="code")
        for o in c.outputs
        if PLOTLY in o.get("data", {})
    ]
    assert figures, "a chapter without a figure"
    for spec in figures:
        assert len(spec["layout"]["meta"]["alt"]) >= 20
        assert spec["config"]["showSendToCloud"] is False
        assert len(json.dumps(spec)) < 320_000
    metas = [s["layout"]["meta"] for s in figures]
    assert any("predict" in m for m in metas), "no figure to predict"
    assert any(m.get("controls") for m in metas), "no figure to play with"


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_stubs_fail_and_solutions_pass(path):
    run = run_of(path)
    stubs = [f for c in cells(run, "exercise") for f in facts(c) if "check" in f]
    solutions = [f for c in cells(run, "solution") for f in facts(c) if "check" in f]
    assert len(stubs) >= 2
    assert {f["check"] for f in stubs} == {f["check"] for f in solutions}
    assert all(f["check"].startswith(path.stem[:2] + "-") for f in stubs)
    assert not [f["check"] for f in stubs if f["passed"]], "a stub passes its check"
    assert not [f["check"] for f in solutions if not f["passed"]], "a solution fails its check"


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_quiz_explains_every_choice(path):
    html = [
        o["data"]["text/html"]
        for c in cells(run_of(path), "quiz")
        for o in c.outputs
        if facts({"outputs": [o]})
    ]
    assert 3 <= len(html) <= 5
    for question in html:
        choices = question.count("<details")
        assert choices >= 2 and question.count("lcx-right") >= 1
        assert (
            all(len(why.strip()) > 10 for why in re.findall(r"</b>([^<]*)</div></details>", question))
            and question.count("</b>") == choices + 1
        )


@pytest.mark.notebook
@pytest.mark.slow
@every
def test_play_and_measure_show_something(path):
    run = run_of(path)
    play = [
        o
        for c in section(run, "Play")
        if c.cell_type == "code"
        for o in c.outputs
        if PLOTLY in o.get("data", {})
    ]
    assert any(o["data"][PLOTLY]["layout"]["meta"].get("controls") for o in play), "nothing moves in Play"
    for heading in ("Break it", "Measure", "Put it in a real model", "Build it by hand"):
        assert any(c.cell_type == "code" and c.outputs for c in section(run, heading)), (
            f"nothing runs in {heading}"
        )


@every
def test_headings_in_order(path):
    text = "\n".join(c.source for c in cells(path, kind="markdown"))
    assert re.findall(r"^## (.+?)\s*$", text, re.M) == HEADINGS
    assert len(re.findall(r"^# ", text, re.M)) == 1


@every
def test_first_cells(path):
    first = cells(path)[:5]
    assert first[0].cell_type == "markdown" and first[0].source.startswith("# ")
    assert [first[i].metadata.get("tags", [None])[0] for i in (1, 2, 3)] == ["badges", "setup", "parameters"]
    assert first[3].source.strip() == 'PROFILE = "auto"'
    rest = [c.source for c in cells(path, kind="code")[2:3]]
    assert "lcx.profile(PROFILE)" in rest[0]
    for tag in ("badges", "setup", "parameters", "claims"):
        assert len(cells(path, tag)) == 1, f"one cell is tagged {tag}"


@every
def test_generated_cells_are_in_sync(path):
    assert json.loads(load_script("sync").synced(path)) == json.loads(path.read_text()), (
        "run python book/sync.py"
    )


def test_stripped():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, notebooks())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"outputs are committed: run nbstripout notebooks/*.ipynb\n{done.stdout}"


@every
def test_exercises_and_solutions_pair_up(path):
    kinds = [
        (t, c)
        for c in cells(path, kind="code")
        for t in ("exercise", "solution")
        if t in c.metadata.get("tags", [])
    ]
    assert [t for t, _ in kinds] == ["exercise", "solution"] * (len(kinds) // 2) and len(kinds) >= 4
    prose = "\n".join(c.source for c in cells(path, kind="markdown"))
    assert len(re.findall(r"^### Exercise \d+\.\d+ · .+\n+[●○]{3} · \d+ min", prose, re.M)) == len(kinds) // 2
    for tag, cell in kinds:
        assert "lcx.check(" in cell.source
        if tag == "solution":
            assert "hide-cell" in cell.metadata["tags"] and cell.metadata.get("jupyter", {}).get(
                "source_hidden"
            )
            assert cell.source.startswith("# @title Solution")
    parts = re.split(r"^### Exercise ", prose, flags=re.M)[1:]
    assert all("<summary>Hint" in part for part in parts), "an exercise without a hint"


@every
def test_claims_are_the_last_code_cell(path):
    last = cells(path, kind="code")[-1]
    assert "claims" in last.metadata.get("tags", []) and last.source.count("assert ") >= 2


@every
def test_code_cells_are_short(path):
    long = [c.source.splitlines()[0] for c in cells(path, kind="code") if len(c.source.splitlines()) > 40]
    assert not long, "longer than a screen: " + "; ".join(long)


@every
def test_plain_markdown_only(path):
    """JupyterLab and Colab show MyST roles and directives as raw text."""
    for cell in cells(path, kind="markdown"):
        assert not re.search(r"\{[a-z:]+\}`|^(:::|```)\{", cell.source, re.M), cell.source[:80]


@every
def test_relative_links_lead_to_files(path):
    for cell in cells(path, kind="markdown"):
        for link in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            if re.match(r"[a-z]+:", link) or link.startswith("#"):
                continue
            assert (path.parent / link.split("#")[0]).is_file(), (
                f"{path.name} links to {link}, which is not there"
            )


@every
def test_core_function_is_shown(path):
    assert any("inspect.getsource" in c.source for c in cells(path, kind="code"))


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT / "notebooks")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
