"""Measured results: small JSON files that say how they were made, committed under book/results."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import LcxError

PROVENANCE = ("command", "seed", "versions", "device", "date")


def results_dir() -> Path:
    """In a clone the folder book/results; in an installed wheel the copy inside the package."""
    packaged = Path(__file__).parent / "results"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "book" / "results"


def result(name: str) -> dict[str, Any]:
    """Read the committed result `name`. Its "made_by" entry names command, seed, versions, device and date."""
    path = results_dir() / f"{name}.json"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in results_dir().glob("*.json"))) or "none"
        raise LcxError(f"no committed result {name!r}: have {have}; `lcx measure` makes them")
    return json.loads(path.read_text())


def device_name() -> str:
    """The processor or GPU the numbers were made on, as a person would name it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    threads = torch.get_num_threads()
    return f"{model or platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def made_by(command: str, seed: int) -> dict[str, Any]:
    """The provenance every result carries."""
    from importlib.metadata import version

    return {
        "command": command,
        "seed": seed,
        "versions": {
            "python": sys.version.split()[0],
            **{p: version(p) for p in ("lcx", "torch", "transformers")},
        },
        "device": device_name(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_json(path: str | Path, data: Any) -> Path:
    """Write JSON to a temporary file beside `path` and rename it, so that no half-written file is ever left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(data, f, indent=1, ensure_ascii=False)
            f.write("\n")
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise
    return path
