"""What is declared in several places says the same everywhere: requirements, pins, versions, the repository URL."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import lcx

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
URL = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def needs(lines: list[str]) -> dict[str, SpecifierSet]:
    found = {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}
    assert len(found) == len(lines), "a package is named twice"
    return found


def pins() -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [
        re.split(r"===?", line.split(";")[0].strip()) for line in lines if line and not line.startswith("-")
    ]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds exact versions only"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_conda_environment_equals_pyproject():
    *conda, from_pip = CONDA["dependencies"]
    assert CONDA["channels"][0] == "conda-forge"
    lines = from_pip["pip"]
    assert lines[-1] == "-e ."
    packages = [line for line in lines if not line.startswith("-")]
    assert needs(packages) == needs([*PROJECT["dependencies"], *EXTRAS["book"]])
    python, pip = conda
    assert pip == "pip"
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_the_book_has_what_its_reader_was_promised():
    promised = {"jupyterlab", "torch", "transformers", "jupyter-book", "plotly", "ipywidgets", "papermill"}
    assert promised <= needs([*PROJECT["dependencies"], *EXTRAS["book"]]).keys()


@pytest.mark.slow
def test_binder_accepts_the_environment():
    """Without Docker, repo2docker only says what it would build; the conda solution itself is not tried."""
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r'env update .*"environment\.yml"', done.stdout + done.stderr)


def test_every_requirement_is_pinned_to_a_version_that_fits():
    wanted = [
        line
        for line in [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]
        if not line.startswith("lcx[")
    ]
    pinned = pins()
    for line in wanted:
        r = Requirement(line)
        name = canonicalize_name(r.name)
        assert name in pinned, f"constraints.txt has no {r.name}"
        assert r.specifier.contains(pinned[name], prereleases=True), f"{r} but {pinned[name]}"


def test_versions_agree():
    version = PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert lcx.__version__ == version == citation["version"]
    assert re.search(rf"^## \[(Unreleased|{re.escape(version)})\]", changelog, re.M)


@pytest.mark.slow
def test_citation_is_valid(tmp_path):
    def check(path: Path) -> int:
        command = [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.citation-file-format",
            str(path),
        ]
        return subprocess.run(command, capture_output=True).returncode

    assert check(ROOT / "CITATION.cff") == 0
    bad = tmp_path / "CITATION.cff"
    bad.write_text((ROOT / "CITATION.cff").read_text().replace("family-names", "surname"))
    assert check(bad) != 0


def test_licences():
    assert (
        PROJECT["license"] == "Apache-2.0" == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"]
    )
    assert (
        "Apache License" in (ROOT / "LICENSE").read_text()
        and "END OF TERMS" in (ROOT / "LICENSE").read_text()
    )
    assert "Attribution 4.0 International" in (ROOT / "book" / "LICENSE").read_text()


def test_the_repository_url_is_the_one_of_the_configuration():
    """It stands in _config.yml; where a file must repeat it, it is the same."""
    host, path = re.match(r"https://([^/]+)(/.+)", URL).groups()
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "pyproject.toml",
        "book/setup.md",
    ):
        text = (ROOT / name).read_text()
        own = [
            found
            for found in re.findall(rf"{re.escape(host)}/[\w.-]+/([\w.-]+)", text)
            if found.startswith("lcx")
        ]
        assert len(own) == len(re.findall(rf"{re.escape(host)}{re.escape(path)}(?![\w-])", text)), name


def test_every_public_name_exists():
    for name in lcx.__all__:
        assert getattr(lcx, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        _ = lcx.nope


DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_files_commands_and_targets_that_exist(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + re.findall(
        r'(?:src|href)="(?!https?:)([^"]+)"', text
    ):
        assert (ROOT / target).exists(), f"{name} links to {target}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"{name} says make {target}"
    from lcx.cli import app, zoo_app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    for command in re.findall(r"`lcx ([a-z]+)", text) + re.findall(r"^lcx ([a-z]+)", text, re.M):
        assert command in known, f"{name} says lcx {command}"
    for command in re.findall(r"lcx zoo ([a-z]+)", text):
        assert command in {c.name for c in zoo_app.registered_commands}


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
