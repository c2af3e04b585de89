"""The dial, the committed results, and what `import lcx` costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import lcx
from lcx import results
from lcx.profiles import PROFILES


def test_profile_by_name_and_by_environment(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LCX_PROFILE", raising=False)
    assert lcx.profile().name == "book"
    monkeypatch.setenv("LCX_PROFILE", "smoke")
    assert lcx.profile("auto").name == "smoke" and lcx.profile("full").name == "full"
    assert (lcx.profile().device, lcx.profile().dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("major, dtype", [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_profile_on_a_gpu(monkeypatch, major, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.delenv("LCX_PROFILE", raising=False)
    assert (lcx.profile().name, lcx.profile().device, lcx.profile().dtype) == ("colab", "cuda", dtype)
    assert lcx.profile("book").device == "cpu", "the published page is made on a CPU"


@pytest.mark.parametrize("name", ["big", "", "Smoke"])
def test_unknown_profile(monkeypatch, name):
    with pytest.raises(lcx.errors.UnknownProfileError, match="auto, smoke, book, colab, full"):
        lcx.profile(name)
    monkeypatch.setenv("LCX_PROFILE", "huge")
    with pytest.raises(lcx.errors.UnknownProfileError, match="'huge'"):
        lcx.profile()


def test_pick_falls_back_to_the_smaller_profile():
    picks = {n: lcx.Profile(n, "cpu", torch.float32) for n in PROFILES}
    assert [picks[n].pick(smoke=1, book=2) for n in PROFILES] == [1, 2, 2, 2]
    assert [picks[n].pick(smoke=1, book=2, colab=3) for n in PROFILES] == [1, 2, 3, 3]
    assert [picks[n].pick(smoke=1, book=2, colab=3, full=4) for n in PROFILES] == [1, 2, 3, 4]


def test_result_is_read_back_and_a_missing_one_names_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "results_dir", lambda: tmp_path)
    results.write_json(
        tmp_path / "curve.json", {"loss": [1.5], "made_by": results.made_by("lcx measure curve", 7)}
    )
    made = lcx.result("curve")["made_by"]
    assert (
        set(made) == set(results.PROVENANCE)
        and made["seed"] == 7
        and made["versions"]["torch"] == torch.__version__
    )
    with pytest.raises(
        lcx.LcxError, match="no committed result 'other': have curve; `lcx measure` makes them"
    ):
        lcx.result("other")


def test_every_committed_result_says_how_it_was_made():
    for path in results.results_dir().glob("*.json"):
        data = json.loads(path.read_text())
        entries = data.values() if path.stem == "receipts" else [data["made_by"]]
        for entry in entries:
            assert {"date", "device", "versions"} <= set(entry), path.name


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = results.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        results.write_json(path, {"new": 1, "bad": object()})
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_import_is_quick_and_loads_nothing_heavy():
    code = """
import sys, time
began = time.perf_counter()
import lcx
took = time.perf_counter() - began
dir(lcx)
print(took, *[m for m in ("torch", "transformers", "plotly", "numpy", "IPython") if m in sys.modules])
"""
    best = []
    for _ in range(3):
        took, *heavy = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert not heavy
        best.append(float(took))
    assert min(best) <= 0.3


def test_every_public_name_loads():
    for name in lcx.__all__:
        assert getattr(lcx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lcx.nothing  # noqa: B018
