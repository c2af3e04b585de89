"""A notebook on Colab: torch and much else are there, lcx is not. What is there must stay.

The real runtime is out of reach of a test, so this one imitates it: an environment of its own that sees every
package of this one except lcx, a stub of google.colab, an empty working folder, and lcx as a wheel. Once a week
.github/workflows/colab.yml runs the notebooks in Colab's own image.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lcx.run import notebooks

ROOT = Path(__file__).parents[2]
WHEEL_BUDGET = 20e6  # bytes; Colab builds the wheel from a clone each time

# Colab's image with GPU, February 2026, Python 3.12: github.com/googlecolab/backend-info, pip-freeze.gpu.txt
COLAB = {
    "torch": "2.10.0+cu128",
    "transformers": "5.0.0",
    "accelerate": "1.12.0",
    "safetensors": "0.7.0",
    "numpy": "2.0.2",
    "scipy": "1.16.3",  # from the list of June 2026
    "plotly": "5.24.1",
    "ipywidgets": "7.7.1",
    "ipython": "7.34.0",
    "tqdm": "4.67.3",
    "typer": "0.24.1",
    "rich": "13.9.4",
    "packaging": "26.0",
    "platformdirs": "4.9.2",
    "pyyaml": "6.0.3",
}
PROBE = """
import json, os, torch, lcx
from pathlib import Path
home = Path(lcx.__file__).parent
print("PROBE" + json.dumps({
    "lcx": str(home), "torch": [os.path.realpath(torch.__file__), torch.__version__], "cwd": os.listdir(),
    "zoo": sorted(p.parent.name for p in home.glob("zoo/*/model.safetensors")),
    "results": sorted(p.name for p in home.glob("results/*.json")),
}))
"""


def test_bounds_accept_what_colab_has():
    """Else pip would replace a package under a running kernel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for r in map(Requirement, project["dependencies"]):
        if r.name in COLAB:
            assert r.specifier.contains(COLAB[r.name]), (
                f"Colab has {r.name} {COLAB[r.name]}, lcx asks for {r}"
            )
    missing = {Requirement(d).name for d in project["dependencies"]} - COLAB.keys()
    assert missing == {"gguf"}, (
        "installed on every start: keep this list short, and free of compiled packages"
    )


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_a_notebook_needs_nothing_beside_it(path):
    """Colab opens one file in an empty folder. That the set-up cells are equal is tested with the notebooks."""
    code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert "setup" in code[0]["metadata"]["tags"], "the set-up cell comes first"
    rest = "".join("".join(c["source"]) for c in code[1:])
    assert not re.search(r"\.\./|/content|pip install", rest)


def test_nothing_installs_lcx_by_its_bare_name():
    """No package of ours is on a public index, so that name could become anyone's."""
    suffixes = {".py", ".md", ".yml", ".yaml", ".toml", ".ipynb", ".sh", ".txt", ".cfg", ""}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not files:
        pytest.skip("not a git checkout")
    bare = re.compile(r"pip3? install(?:\s+-{1,2}[a-z-]+)*\s+['\"]?lcx(?![\w-]|\s*@)", re.I)
    assert bare.search("pip install -q lcx") and not bare.search("pip install 'lcx @ git+https://x'")
    for name in files:
        path = ROOT / name
        if name.startswith("tests/") or path.suffix not in suffixes or not path.is_file():
            continue
        assert not bare.search(path.read_text(errors="replace")), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("lcx-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_checkpoints_and_results_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "lcx", "book/results"], cwd=ROOT, capture_output=True, text=True
    )
    if not tracked.stdout:
        pytest.skip("not a git checkout")
    wanted = {n.replace("book/results/", "lcx/results/") for n in tracked.stdout.splitlines()}
    wanted = {n for n in wanted if not n.endswith(".gitkeep")}
    assert wanted <= names, f"not in the wheel: {sorted(wanted - names)}"
    assert all(n.startswith(("lcx/", "lcx-")) for n in names)
    assert not [n for n in names if "__pycache__" in n or n.endswith((".ipynb", ".pt", ".bin"))]
    assert wheel.stat().st_size < WHEEL_BUDGET


@pytest.fixture
def colab(tmp_path):
    """(python, environment variables) of the imitation."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], capture_output=True
    )
    assert made.returncode == 0, made.stderr
    python = tmp_path / "venv" / "bin" / "python"
    out = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    )
    site = Path(out.strip())
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.match(r"_?_?(editable_.*)?lcx|__pycache__|distutils-precedence", entry.name):
            (site / entry.name).symlink_to(entry)
    if not (site / "google").exists():
        (site / "google" / "colab").mkdir(parents=True)
        (site / "google" / "colab" / "__init__.py").write_text("")
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
    }
    kernel = tmp_path / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({**spec, "display_name": "Python 3"}))
    env = {k: v for k, v in os.environ.items() if k not in ("LCX_STATIC", "PYTHONPATH", "LCX_PROFILE")}
    env |= {"COLAB_RELEASE_TAG": "imitation", "JUPYTER_PATH": str(tmp_path / "jupyter")}
    return python, env


def would_install(python: Path, *arguments: str) -> set[str]:
    """What pip would install, by name."""
    command = [python, "-m", "pip", "install", "--dry-run", "-q", "--report", "-", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]}


def empty_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_only_what_is_missing_would_be_installed(wheel, colab, tmp_path):
    python, _ = colab
    assert would_install(python, "--no-index", str(wheel)) == {"lcx"}
    # Colab has no gguf. Newer versions of the rest are on offer, and must be left there.
    index = tmp_path / "index"
    index.mkdir()
    for name in ("gguf", "torch", "numpy", "transformers", "plotly"):
        empty_wheel(index, name, "5.99.0" if name == "transformers" else "99.0")
    for link in python.parents[1].glob("lib/*/site-packages/gguf*"):
        link.unlink()
    offered = ["--no-index", "--find-links", str(index)]
    assert would_install(python, *offered, str(wheel)) == {"lcx", "gguf"}


@pytest.mark.slow
@pytest.mark.notebook
def test_a_notebook_runs_alone_and_torch_stays(wheel, colab, tmp_path):
    import nbformat
    import torch

    if not notebooks():
        pytest.skip("no notebook yet")
    python, env = colab
    path = notebooks()[
        min(1, len(notebooks()) - 1)
    ]  # the second chapter reads a zoo model and a committed result
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(nbformat.v4.new_code_cell(PROBE))
    work = tmp_path / "content"
    work.mkdir()
    nbformat.write(nb, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", tmp_path / "in.ipynb", tmp_path / "out.ipynb"]
    command += [
        "-k",
        "colab",
        "-p",
        "PROFILE",
        "smoke",
        "--cwd",
        work,
        "--no-progress-bar",
        "--log-level",
        "ERROR",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "LCX_SPEC": str(wheel)})
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code"]
    setup = "".join(o.get("text", "") for o in cells[0].outputs)
    assert f"torch {torch.__version__}, GPU: " in setup and "PROFILE" in setup
    probe = json.loads(cells[-1].outputs[0]["text"].removeprefix("PROBE"))
    assert Path(probe["lcx"]).is_relative_to(tmp_path / "venv"), "lcx must come from the wheel"
    assert probe["torch"] == [os.path.realpath(torch.__file__), torch.__version__], "torch was replaced"
    assert probe["cwd"] == [], "a notebook leaves no file beside it"
    zoo = {p.parent.name for p in (ROOT / "lcx" / "zoo").glob("*/model.safetensors")}
    assert set(probe["zoo"]) == zoo
    assert set(probe["results"]) == {p.name for p in (ROOT / "book" / "results").glob("*.json")}
