"""The runner: errors in one line, runs kept until something they depend on changes, nothing half-written."""

from __future__ import annotations

import json
import sys

import nbformat
import pytest

from lcx import run
from lcx.errors import LcxError, NotebookError, UnknownProfileError

v4 = nbformat.v4


def write(path, *code, markdown="# Title"):
    cells = [
        v4.new_markdown_cell(markdown),
        v4.new_code_cell('PROFILE = "auto"', metadata={"tags": ["parameters"]}),
    ]
    cells += [v4.new_code_cell(c) for c in code]
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def text_of(path) -> str:
    return "".join(
        o.get("text", "") for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])
    )


@pytest.mark.slow
def test_runs_with_this_interpreter_the_profile_and_no_live_widgets(tmp_path):
    nb = write(
        tmp_path / "a.ipynb",
        "import os, sys\nprint(PROFILE, sys.executable, os.environ['LCX_STATIC'], os.getcwd())",
    )
    out = run.execute(nb, "smoke", out_dir=tmp_path / "out")
    assert text_of(out).split() == ["smoke", sys.executable, "1", str(tmp_path)]
    injected = [
        c
        for c in nbformat.read(out, as_version=4).cells
        if "injected-parameters" in c.metadata.get("tags", [])
    ]
    assert len(injected) == 1 and "remove-cell" in injected[0].metadata.tags
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["profile"] == "smoke" and record["seconds"] > 0
    if sys.platform == "linux":
        assert 10**7 < record["peak_memory_bytes"] < 10**10
        assert 0 < record["cpu_seconds"] < 60
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.ipynb", "a.json"}


@pytest.mark.slow
def test_run_is_kept_until_code_or_profile_changes(tmp_path):
    code = "import uuid\nprint(uuid.uuid4())"
    nb = write(tmp_path / "a.ipynb", code)
    first = text_of(run.execute(nb, "smoke", out_dir=tmp_path / "o"))
    assert text_of(run.execute(nb, "smoke", out_dir=tmp_path / "o")) == first
    write(nb, code, markdown="# A better title")
    out = run.execute(nb, "smoke", out_dir=tmp_path / "o")
    assert text_of(out) == first and nbformat.read(out, as_version=4).cells[0].source == "# A better title"
    second = text_of(run.execute(nb, "smoke", out_dir=tmp_path / "o", use_cache=False))
    third = text_of(run.execute(nb, "book", out_dir=tmp_path / "o"))
    write(nb, code + " ")
    fourth = text_of(run.execute(nb, "book", out_dir=tmp_path / "o"))
    assert len({first, second, third, fourth}) == 4


def test_key_depends_on_tags_results_and_package(tmp_path, monkeypatch):
    nb = nbformat.read(write(tmp_path / "a.ipynb", "1"), as_version=4)
    keys = [run.cache_key(nb, "smoke")]
    assert run.cache_key(nb, "smoke") == keys[0]
    keys.append(run.cache_key(nb, "book"))
    nb.cells[2].metadata["tags"] = ["quiz"]
    keys.append(run.cache_key(nb, "smoke"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "results" / "receipts.json").write_text("{}")
    bare = run.cache_key(nb, "smoke")
    (tmp_path / "book" / "results" / "receipts.json").write_text('{"a": 1}')
    assert run.cache_key(nb, "smoke") == bare, "a receipt changes no run"
    (tmp_path / "book" / "results" / "curve.json").write_text("{}")
    keys.append(run.cache_key(nb, "smoke"))
    package = tmp_path / "lcx"
    package.mkdir()
    (package / "plan.py").write_text("a = 1")
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    keys.append(run.cache_key(nb, "smoke"))
    (package / "plan.py").write_text("a = 2")
    keys.append(run.cache_key(nb, "smoke"))
    (package / "book_ext.py").write_text("b = 1")
    assert run.cache_key(nb, "smoke") == keys[-1], "the page builder changes no run"
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_failing_cell_is_named_and_nothing_is_left(tmp_path):
    nb = write(tmp_path / "bad.ipynb", "x = 0", "# divide\n1 / x")
    with pytest.raises(NotebookError) as e:
        run.execute(nb, "smoke", out_dir=tmp_path / "o")
    assert str(e.value) == "notebook bad, cell 4 of 4 (`# divide`): ZeroDivisionError: division by zero"
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills the kernel by signal")
def test_dead_kernel_is_named_and_an_older_run_is_not_passed_off(tmp_path):
    nb = write(tmp_path / "a.ipynb", "print(1)")
    run.execute(nb, "smoke", out_dir=tmp_path / "o")
    write(nb, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "2")
    for _ in range(2):
        with pytest.raises(NotebookError, match=r"cell 3 of 4 \(`import os, signal`\): the kernel died"):
            run.execute(nb, "smoke", out_dir=tmp_path / "o")


@pytest.mark.slow
def test_cell_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(run.CELL_SECONDS, "smoke", 2)
    nb = write(tmp_path / "a.ipynb", "import time\ntime.sleep(60)")
    with pytest.raises(NotebookError, match=r"cell 3 of 3 \(`import time`\): no answer in 2 s"):
        run.execute(nb, "smoke", out_dir=tmp_path / "o")


@pytest.mark.slow
def test_receipt_is_recorded_beside_the_others(tmp_path, monkeypatch):
    from lcx import results

    monkeypatch.setattr(results, "results_dir", lambda: tmp_path)
    (tmp_path / "receipts.json").write_text('{"other": {"seconds": 1}}')
    nb = write(tmp_path / "a.ipynb", "1")
    run.execute(nb, "smoke", out_dir=tmp_path / "o")
    run.execute(nb, "smoke", out_dir=tmp_path / "o", receipt=True)
    receipts = json.loads((tmp_path / "receipts.json").read_text())
    assert receipts["other"] == {"seconds": 1}
    assert set(receipts["a"]) == {"profile", "seconds", "peak_memory_bytes", "date", "versions", "device"}


def test_wrong_names(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for stem in ("01-cost", "02-edge", "02-edge-two"):
        write(tmp_path / "notebooks" / f"{stem}.ipynb", "1")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert [p.stem for p in run.notebooks()] == ["01-cost", "02-edge", "02-edge-two"]
    assert run.find("01").stem == "01-cost" and run.find("02-edge.ipynb").stem == "02-edge"
    with pytest.raises(NotebookError, match="no notebook '09': have 01-cost, 02-edge, 02-edge-two"):
        run.execute("09", "smoke")
    with pytest.raises(NotebookError, match="more than one notebook '02'"):
        run.execute("02", "smoke")
    with pytest.raises(NotebookError, match="no notebook ''"):
        run.find("")
    with pytest.raises(UnknownProfileError, match="auto, smoke, book, colab, full"):
        run.execute("01", "enormous")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    nb = write(tmp_path / "a.ipynb", "1")
    with pytest.raises(LcxError, match=r"needs papermill: pip install"):
        run.execute(nb, "smoke", out_dir=tmp_path / "o")
