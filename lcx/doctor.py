"""`lcx doctor`: what is installed, what is cached, what is missing and the command that mends it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from packaging.requirements import Requirement

from . import __version__
from .errors import LcxError
from .fetch import cache_dir

ABSENT = "not here"


def examine() -> tuple[str, bool]:
    """(report as plain text, whether something required is missing). Downloads nothing, changes nothing."""
    required, optional = [], []  # (what is wrong, how to mend it)
    sections = {
        "versions": _versions(required, optional),
        "machine": _machine(required),
        "models and texts": _cached(required, optional),
    }
    lines = []
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [f"[{title}]", *(f"{name:<{width}}  {value}" for name, value in rows), ""]
    for title, problems in (("missing", required), ("optional, not here", optional)):
        if problems:
            lines += [f"[{title}]", *(f"{what}: {fix}" for what, fix in problems), ""]
    lines.append("Something required is missing." if required else "Everything required is here.")
    return "\n".join(lines), bool(required)


def _requirements() -> list[tuple[Requirement, str]]:
    """(requirement, extra or "") of the installed package, each once, without those for other platforms."""
    found: dict[str, tuple[Requirement, str]] = {}
    for line in metadata.requires("lcx") or ():
        r = Requirement(line)
        extra = next(
            (e for e in ("", "book", "test") if r.marker is None or r.marker.evaluate({"extra": e})), None
        )
        if extra is not None and r.name not in found:
            found[r.name] = (r, extra)
    return sorted(found.values(), key=lambda pair: ("", "book", "test").index(pair[1]))


def _versions(required: list, optional: list) -> list[tuple[str, str]]:
    rows = [("python", sys.version.split()[0]), ("lcx", f"{__version__} in {_short(Path(__file__).parent)}")]
    lacking: dict[str, list[str]] = {}
    for r, extra in _requirements():
        try:
            have = metadata.version(r.name)
        except metadata.PackageNotFoundError:
            rows.append((r.name, f"not installed{f' (extra {extra!r})' if extra else ''}"))
            lacking.setdefault(extra, []).append(f"{r.name}{r.specifier}")
            continue
        fits = r.specifier.contains(have, prereleases=True)
        rows.append((r.name, have if fits else f"{have}, but lcx needs {r.specifier}"))
        if not fits:
            lacking.setdefault(extra, []).append(f"{r.name}{r.specifier}")
    for extra, names in lacking.items():
        command = "python -m pip install " + " ".join(f"'{n}'" for n in names)
        what = f"{len(names)} package{'s' * (len(names) > 1)}" + (f" of the extra {extra!r}" if extra else "")
        (optional if extra else required).append((what, command))
    return rows


def _machine(required: list) -> list[tuple[str, str]]:
    rows = [("system", f"{platform.system()} {platform.release()} {platform.machine()}")]
    memory = _memory()
    rows += [("processor", f"{_processor()}, {os.cpu_count()} cores"), ("memory", memory)]
    try:
        import torch

        from .profiles import profile

        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            rows.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {_gib(free)} free of {_gib(total)}"))
        if not torch.cuda.is_available():
            rows.append(("GPU", "none that torch can use"))
        rows.append(
            (
                "torch",
                f"{torch.get_num_threads()} threads, CUDA build {torch.version.cuda or 'no (CPU only)'}",
            )
        )
        rows.append(("auto profile", str(profile("auto"))))
    except LcxError as e:  # LCX_PROFILE holds an unknown name
        required.append((f"LCX_PROFILE={os.environ.get('LCX_PROFILE')}", str(e)))
    except ModuleNotFoundError:
        rows.append(("GPU", "unknown without torch"))
    except Exception as e:
        required.append(
            (
                f"torch does not load ({type(e).__name__}: {str(e).splitlines()[0]})",
                "python -m pip install --force-reinstall torch",
            )
        )
    return rows


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> str:
    info = Path("/proc/meminfo")
    if info.is_file():
        kib = {
            line.split(":")[0]: int(line.split()[1])
            for line in info.read_text().splitlines()
            if line.endswith("kB")
        }
        return f"{_gib(kib['MemAvailable'] * 1024)} free of {_gib(kib['MemTotal'] * 1024)}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return "unknown on this system"


def _cached(required: list, optional: list) -> list[tuple[str, str]]:
    folder = cache_dir()
    parent = next((p for p in (folder, *folder.parents) if p.is_dir()), Path.home())
    rows = [("cache", f"{_short(folder)}, {_gib(shutil.disk_usage(parent).free)} free")]
    if not os.access(parent, os.W_OK):
        required.append(
            (f"the cache {_short(folder)} cannot be written", "set LCX_CACHE to a folder of yours")
        )
    for name, (where, call) in _fetched().items():
        rows.append((name, f"in {_short(where)}" if where else ABSENT))
        if where is None:
            optional.append((name, f'fetched once by python -c "import lcx; {call}"'))
    try:
        zoo = zoo_rows()
    except ModuleNotFoundError as e:
        zoo = [("models", f"cannot be listed without {e.name}", "")]
    for name, state, _ in zoo:
        rows.append((f"zoo {name}", state))
        if state == ABSENT:
            required.append((f"checkpoint {name}", f"lcx zoo train {name}"))
    return rows


def _fetched() -> dict[str, tuple[Path | None, str]]:
    """name -> (where it lies or None, the call that fetches it)."""
    from .corpora import cached_texts
    from .models import cached_models

    found = {name: (where, f"lcx.load('{name}')") for name, where in cached_models().items()}
    return found | {name: (where, f"lcx.text('{name}')") for name, where in cached_texts().items()}


def zoo_rows() -> list[tuple[str, str, str]]:
    """(name, size of its checkpoint or ABSENT, what it is) of every model in the zoo."""
    from . import zoo

    rows = []
    for name in zoo.names():
        file = zoo.HERE / name / "model.safetensors"
        size = f"{file.stat().st_size / 1e6:.1f} MB" if file.is_file() else ABSENT
        rows.append((name, size, zoo.recipe(name).about))
    return rows


def _gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"


def _short(path: Path) -> str:
    """The path with the home folder as ~, so that a pasted report does not tell the user's name."""
    home = str(Path.home())
    return f"~{str(path)[len(home) :]}" if str(path).startswith(home + os.sep) else str(path)
