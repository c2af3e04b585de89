"""Build the book: run every notebook once, stage the executed copies beside the prose, let Jupyter Book make the pages.

    python book/build.py                              the published book, in _build/html
    python book/build.py --profile smoke --out DIR    the same pages from quick runs, in DIR/_build/html
    python book/build.py --receipts                   record time and memory of the runs in the badge rows

A run is used again until its code, the package, the results or the versions change (lcx/run.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from lcx.errors import LcxError
from lcx.run import execute, notebooks

ROOT = Path(__file__).resolve().parents[1]


def stage(executed: Sequence[Path], target: Path, extra: Sequence[Path] = ()) -> Path:
    """Lay out `target` like the repository, with executed notebooks in place of the committed ones.

    The same relative paths keep links, page addresses and the Colab links right. Modification times are kept, so that
    an unchanged page is not built again. `extra` are executed notebooks added after the last chapter (for tests).
    """
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("_build", "__pycache__", "*.py", ".*")
    shutil.copytree(ROOT / "book", target / "book", ignore=ignore)
    (target / "notebooks").mkdir()
    for path in (*executed, *extra):
        shutil.copy2(path, target / "notebooks")
    shutil.copy2(ROOT / "_config.yml", target)
    if extra:
        toc = yaml.safe_load((target / "book/_toc.yml").read_text())
        toc["parts"].append(
            {"caption": "Extra", "chapters": [{"file": f"notebooks/{p.stem}"} for p in extra]}
        )
        (target / "book/_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    return target


def pages(source: Path, out: Path) -> Path:
    """Build `source` (made by `stage`) with warnings as errors; returns the folder of the pages. Exits on failure."""
    command = [
        sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source), "--path-output", str(out),
        "--config", str(source / "_config.yml"), "--toc", str(source / "book/_toc.yml"),
        "-W", "-n", "--keep-going", "-q",
    ]  # fmt: skip
    env = {**os.environ, "NO_COLOR": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    html = out / "_build" / "html"
    if done.returncode or not (html / "index.html").is_file():
        # Sphinx reads only what changed: without this the next build would not see the same warning again
        shutil.rmtree(out / "_build" / ".doctrees", ignore_errors=True)
        said = done.stdout.replace(f"{source}/", "")
        lines = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
        print("\n".join(lines) or said, file=sys.stderr)
        sys.exit(f"the pages were not built: {len(lines)} warnings, shown above")
    return html


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="book", help="smoke, book, colab or full (default: book)")
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="pages go to OUT/_build/html (default: the repository)"
    )
    parser.add_argument(
        "--receipts", action="store_true", help="record time and memory of the runs in the badge rows"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    books = notebooks()
    executed = []
    try:
        for i, path in enumerate(books, 1):
            print(f"[{i}/{len(books)}] ", end="", file=sys.stderr, flush=True)
            executed.append(execute(path, options.profile, receipt=options.receipts))
    except LcxError as e:
        sys.exit(f"{type(e).__name__}: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; finished notebooks are kept")
    if options.receipts:
        subprocess.run([sys.executable, str(ROOT / "book" / "sync.py")], check=True)
        return
    print("building the pages …", file=sys.stderr, flush=True)
    html = pages(stage(executed, ROOT / "_build" / f"stage-{options.profile}"), options.out.resolve())
    spent = sum(json.loads(p.with_suffix(".json").read_text())["seconds"] for p in executed)
    print(
        f"{len(books)} notebooks (their runs took {clock(spent)} in all); this build took {clock(time.perf_counter() - began)}"
    )
    index = html / "index.html"
    print(f"Open {index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index}")


if __name__ == "__main__":
    main()
