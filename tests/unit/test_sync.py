"""The generated cells: one set-up cell for all, a badge row from the receipts."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, load_script


@pytest.fixture
def sync():
    return load_script("sync")


def test_repository_url_stands_once(sync):
    url, branch = sync.repository()
    assert url.startswith("https://github.com/") and branch
    for path in (ROOT / "book").glob("*.py"):
        assert url not in path.read_text()
    assert f"lcx @ git+{url}" in sync.setup_source()


def test_badges_without_and_with_a_receipt(sync, monkeypatch, tmp_path):
    monkeypatch.setattr(sync, "receipts", dict)
    path = ROOT / "notebooks" / "01-x.ipynb"
    url, branch = sync.repository()
    owner = url.removeprefix("https://github.com/")
    link = f"[Open in Colab](https://colab.research.google.com/github/{owner}/blob/{branch}/notebooks/01-x.ipynb)"
    assert sync.badge_source(path) == f"{link} · time, memory and last check: not measured yet"
    receipt = {
        "seconds": 95.4,
        "peak_memory_bytes": 3 * 2**29,
        "profile": "book",
        "device": "a CPU",
        "date": "2026-01-02",
    }
    monkeypatch.setattr(sync, "receipts", lambda: {"01-x": receipt})
    assert (
        sync.badge_source(path)
        == f"{link} · time: 1 min 35 s (profile book, a CPU) · memory: 1.5 GiB · last verified: 2026-01-02"
    )


def test_check_finds_a_notebook_that_differs(sync, monkeypatch, tmp_path, capsys):
    cells = [
        {"cell_type": "markdown", "id": "0", "metadata": {"tags": ["badges"]}, "source": ["old"]},
        {
            "cell_type": "code",
            "id": "1",
            "metadata": {"tags": ["setup"]},
            "source": [],
            "outputs": [],
            "execution_count": None,
        },
        {
            "cell_type": "code",
            "id": "2",
            "metadata": {},
            "source": ["mine"],
            "outputs": [],
            "execution_count": None,
        },
    ]
    path = tmp_path / "notebooks" / "01-x.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    source, url = sync.setup_source(), sync.repository()
    monkeypatch.setattr(sync, "setup_source", lambda: source)
    monkeypatch.setattr(sync, "repository", lambda: url)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    assert sync.main(["--check"]) == 1 and "01-x.ipynb" in capsys.readouterr().err
    assert sync.main([]) == 0 and sync.main(["--check"]) == 0
    written = json.loads(path.read_text())["cells"]
    assert "".join(written[1]["source"]) == source and written[2]["source"] == ["mine"]
    assert [p.name for p in path.parent.iterdir()] == ["01-x.ipynb"]


def run_cell(
    source: str, tmp_path, *, hide_lcx: bool, pip_fails: bool = False
) -> subprocess.CompletedProcess:
    """Run the set-up cell in a fresh interpreter in which pip only writes down how it was called."""
    script = f"""
import importlib.util, subprocess, sys, json, types
real, hide = importlib.util.find_spec, {hide_lcx}
importlib.util.find_spec = lambda n, *a: None if hide and n == "lcx" else real(n, *a)
def fake(command, **kw):
    pins = open(command[command.index("-c") + 1]).read()
    json.dump([command, pins], open("called.json", "w"))
    return types.SimpleNamespace(returncode={int(pip_fails)}, stdout="", stderr="noise\\nno network")
subprocess.run = fake
exec({source!r})
"""
    env = {**os.environ, "LCX_PROFILE": "smoke", "TMPDIR": str(tmp_path)}
    env.pop("LCX_SPEC", None)
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_setup_installs_nothing_where_lcx_is(sync, tmp_path):
    done = run_cell(sync.setup_source(), tmp_path, hide_lcx=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "called.json").exists()
    [line] = done.stdout.splitlines()
    assert 'PROFILE "auto" means "smoke" here' in line and "GPU:" in line


@pytest.mark.slow
def test_setup_keeps_torch_and_names_the_repository(sync, tmp_path):
    import torch

    assert run_cell(sync.setup_source(), tmp_path, hide_lcx=True).returncode == 0
    command, pins = json.loads((tmp_path / "called.json").read_text())
    assert command[1:4] == ["-m", "pip", "install"] and command[-1] == f"lcx @ git+{sync.repository()[0]}"
    assert f"torch=={torch.__version__}" in pins.splitlines() and "numpy==" in pins


@pytest.mark.slow
def test_setup_says_what_to_do_when_it_fails(sync, tmp_path):
    done = run_cell(sync.setup_source(), tmp_path, hide_lcx=True, pip_fails=True)
    assert (
        done.returncode
        and "lcx was not installed (no network). Run in a terminal: pip install" in done.stderr
    )


def test_setup_is_short_and_never_installs_by_bare_name(sync):
    source = sync.setup_source()
    ast.parse(source)
    assert len([line for line in source.splitlines() if line.strip()]) <= 32
    assert "pip install lcx" not in source and '"lcx"]' not in source
