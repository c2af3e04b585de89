"""Run a notebook from start to end: for the book, for the tests, for a receipt of time and memory.

A run is kept under `_build/executed/<profile>` and used again until something it depends on changes: its code cells,
this package, the committed results and checkpoints, the parameters, or the versions of what computes. A change in the
prose alone re-uses the outputs.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import LcxError, NotebookError, UnknownProfileError
from .profiles import PROFILES

ROOT = Path(__file__).resolve().parents[1]
CELL_SECONDS = {"smoke": 300, "book": 1200, "colab": 3600, "full": None}  # a cell that runs longer hangs
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "plotly")
_NOT_HASHED = (
    "book_ext.py",
    "cli.py",
    "doctor.py",
)  # they change pages and commands, not what a notebook computes


def notebooks() -> list[Path]:
    """The notebooks of the book in reading order; an empty list where the package is installed without a clone."""
    found = (p for p in (ROOT / "notebooks").glob("*.ipynb") if not p.name.startswith("."))
    return sorted(found, key=lambda p: p.stem)


def find(notebook: str | Path) -> Path:
    """The notebook meant by a path, a file name, a stem or the start of one ("02"). Raises NotebookError."""
    path = Path(notebook)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    name = path.name.removesuffix(".ipynb")
    exact = [p for p in notebooks() if p.stem == name]
    matches = exact or [p for p in notebooks() if name and p.stem.startswith(name)]
    if len(matches) != 1:
        have = ", ".join(p.stem for p in notebooks()) or "none here: give the path of an .ipynb file"
        raise NotebookError(
            f"{'no' if not matches else 'more than one'} notebook {str(notebook)!r}: have {have}"
        )
    return matches[0]


def execute(
    notebook: str | Path,
    profile: str = "book",
    out_dir: str | Path | None = None,
    use_cache: bool = True,
    receipt: bool = False,
) -> Path:
    """Run `notebook` with PROFILE = `profile`; returns the path of the executed copy.

    out_dir: where the copy goes (default `_build/executed/<profile>`), with a small JSON file beside it that holds
    the cache key, seconds and peak memory. use_cache: return an earlier run when nothing it depends on has changed.
    receipt: record time and memory of the run in book/results/receipts.json.

    Raises NotebookError for an unknown notebook, a cell that fails or a kernel that dies, UnknownProfileError, and
    LcxError when the packages of the extra "book" are missing. A failed run leaves no file behind.
    """
    source = find(notebook)
    if profile != "auto" and profile not in PROFILES:
        raise UnknownProfileError(f"unknown profile {profile!r}: use one of auto, {', '.join(PROFILES)}")
    nbformat = _need("nbformat")
    base = ROOT if source.is_relative_to(ROOT) else Path.cwd()
    out = Path(out_dir or base / "_build" / "executed" / profile).resolve() / source.name
    record = out.with_suffix(".json")
    nb = nbformat.read(source, as_version=4)
    key = cache_key(nb, profile)
    if use_cache and out.is_file() and record.is_file() and _read(record).get("key") == key:
        _write_notebook(_with_new_prose(nb, nbformat.read(out, as_version=4)), out)
        _say(f"{source.stem}: unchanged, kept the run of {_read(record)['seconds']:.0f} s")
        if receipt:
            _keep_receipt(source.stem, _read(record))
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    _say(f"{source.stem}: running with profile {profile} …")
    began = time.perf_counter()
    done, used = _run(nb, source, profile, out.parent)
    seconds, peak = time.perf_counter() - began, used.get("peak_memory_bytes")
    _write_notebook(done, out)
    from .results import device_name, write_json

    cost = {"seconds": round(seconds, 1), "cpu_seconds": used.get("cpu_seconds"), "peak_memory_bytes": peak}
    made = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": sys.version.split()[0], **{p: _version(p) for p in ("lcx", *_VERSIONS)}},
        "device": device_name(),
    }
    write_json(record, {"key": key, "profile": profile, **cost, **made})
    _say(
        f"{source.stem}: done in {seconds:.0f} s" + (f", peak memory {peak / 2**30:.1f} GiB" if peak else "")
    )
    if receipt:
        _keep_receipt(source.stem, _read(record))
    return out


def cache_key(nb: Any, profile: str) -> str:
    """sha256 over everything a run depends on: code cells and tags, this package, results, profile, versions."""
    h = hashlib.sha256()
    cells = [
        (c["source"], sorted(c["metadata"].get("tags", []))) for c in nb["cells"] if c["cell_type"] == "code"
    ]
    h.update(json.dumps([cells, profile, sys.version, {p: _version(p) for p in _VERSIONS}]).encode())
    files = [p for p in Path(__file__).parent.rglob("*") if p.suffix in (".py", ".json", ".safetensors")]
    files += [p for p in (ROOT / "book" / "results").glob("*.json") if p.name != "receipts.json"]
    for path in sorted(p for p in files if p.name not in _NOT_HASHED):
        h.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()


def _run(nb: Any, source: Path, profile: str, folder: Path) -> tuple[Any, dict[str, float]]:
    """(executed notebook, what its kernel used)."""
    papermill, nbformat = _need("papermill"), _need("nbformat")
    _need("ipykernel")
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    manager, used = _kernel_manager()
    tmp = folder / f".{source.stem}.{os.getpid()}.ipynb"
    try:
        papermill.execute_notebook(
            source, tmp, parameters={"PROFILE": profile}, kernel_name="python3", language="python", cwd=source.parent,
            progress_bar=False, execution_timeout=CELL_SECONDS.get(profile, 1200), kernel_manager_class=manager,
        )  # fmt: skip
        done = nbformat.read(tmp, as_version=4)
    except PapermillExecutionError as e:
        why = f"{e.ename}: {str(e.evalue).strip()}"
        raise NotebookError(_where(source, nb, e.cell_index) + why) from None
    except (CellTimeoutError, DeadKernelError) as e:
        ran = nbformat.read(tmp, as_version=4).cells if tmp.is_file() else []
        last = max((i for i, c in enumerate(ran) if c.metadata.papermill["start_time"]), default=0)
        why = (
            f"no answer in {CELL_SECONDS.get(profile)} s"
            if isinstance(e, CellTimeoutError)
            else "the kernel died (out of memory?)"
        )
        raise NotebookError(_where(source, nb, last) + why) from None
    finally:
        tmp.unlink(missing_ok=True)
    for cell in done.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
    return done, used


def _kernel_manager() -> tuple[type, dict[str, float]]:
    """A kernel manager class that starts this very interpreter, whatever kernels are registered, and the dict in
    which it leaves the kernel's peak resident memory in bytes and its CPU time in seconds (Linux only)."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
    env = {"LCX_STATIC": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    used: dict[str, float] = {}

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=argv, env=env, display_name="Python 3", language="python")

        async def shutdown_kernel(self, *args: Any, **kwargs: Any) -> None:
            proc = Path(f"/proc/{getattr(self.provisioner, 'pid', None)}")
            if (proc / "stat").is_file():
                status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
                ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]  # utime, stime
                used["cpu_seconds"] = round(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), 1)
                used["peak_memory_bytes"] = int(status["VmHWM"].split()[0]) * 1024
            await super().shutdown_kernel(*args, **kwargs)

    return OwnKernel, used


def _where(source: Path, nb: Any, index: int) -> str:
    """Name a cell as its author sees it. papermill's index counts the parameters cell that it puts in."""
    tagged = [i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", [])]
    injected = tagged[0] + 1 if tagged else 0
    index = index - 1 if index >= injected else index
    cell = nb.cells[max(0, min(index, len(nb.cells) - 1))]
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
    return f"notebook {source.stem}, cell {index + 1} of {len(nb.cells)} (`{first}`): "


def _with_new_prose(nb: Any, done: Any) -> Any:
    """`done` with the Markdown of `nb`, whose code cells are the same."""
    result, ran = copy.deepcopy(done), [c for c in done.cells if c.cell_type == "code"]
    result.cells = []
    for cell in nb.cells:
        if cell.cell_type != "code":
            result.cells.append(cell)
            continue
        while "injected-parameters" in ran[0].metadata.get("tags", []):
            result.cells.append(ran.pop(0))
        result.cells.append(ran.pop(0))
    return result


def _write_notebook(nb: Any, path: Path) -> None:
    import nbformat

    text = nbformat.writes(nb) + "\n"
    if path.is_file() and path.read_text() == text:
        return  # the page builder goes by modification times
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _keep_receipt(name: str, record: dict[str, Any]) -> None:
    """Copy what a run cost, when and where it was made, into the committed receipts. The rest of them stays."""
    from .results import results_dir, write_json

    path = results_dir() / "receipts.json"
    receipts = _read(path) if path.is_file() else {}
    receipts[name] = {k: v for k, v in record.items() if k not in ("key", "cpu_seconds")}
    write_json(path, dict(sorted(receipts.items())))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise LcxError(
            f"running notebooks needs {e.name}: pip install papermill nbformat ipykernel, or in a clone pip install -e '.[book]'"
        ) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
