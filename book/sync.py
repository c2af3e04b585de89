"""Fill the generated cells of every notebook: the badge row and the set-up cell.

    python book/sync.py           write them
    python book/sync.py --check   exit 1 and name the notebooks that differ

The cells are found by their tags, `badges` and `setup`. The set-up cell is book/setup_cell.py with the repository URL
of _config.yml; the badge row is made of that URL and of book/results/receipts.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]


def repository() -> tuple[str, str]:
    """(URL, branch) from _config.yml."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return config["url"].rstrip("/"), config["branch"]


def setup_source() -> str:
    return (ROOT / "book" / "setup_cell.py").read_text().rstrip("\n").replace("{url}", repository()[0])


def receipts() -> dict:
    path = ROOT / "book" / "results" / "receipts.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def badge_source(path: Path) -> str:
    """One line of links and facts for the notebook at `path`; plain text, so that no page asks a badge server."""
    url, branch = repository()
    colab = (
        f"https://colab.research.google.com/github{urlsplit(url).path}/blob/{branch}/notebooks/{path.name}"
    )
    receipt = receipts().get(path.stem)
    if receipt is None:
        facts = ["time, memory and last check: not measured yet"]
    else:
        minutes, seconds = divmod(round(receipt["seconds"]), 60)
        peak = receipt["peak_memory_bytes"]
        facts = [
            f"time: {f'{minutes} min ' if minutes else ''}{seconds} s (profile {receipt['profile']}, {receipt['device']})",
            f"memory: {peak / 2**30:.1f} GiB" if peak else "memory: not measured yet",
            f"last verified: {receipt['date']}",
        ]
    return " · ".join([f"[Open in Colab]({colab})", *facts])


def synced(path: Path) -> str:
    """The text of the notebook at `path` with its generated cells filled in."""
    nb = json.loads(path.read_text())
    sources = {"badges": badge_source(path), "setup": setup_source()}
    for cell in nb["cells"]:
        for tag in sources.keys() & set(cell["metadata"].get("tags", [])):
            cell["source"] = sources[tag].splitlines(keepends=True)
            if tag == "setup" and "hide-input" not in cell["metadata"]["tags"]:
                cell["metadata"]["tags"].append("hide-input")
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> int:
    differ = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = synced(path)
        if json.loads(text) == json.loads(path.read_text()):
            continue
        differ.append(path.name)
        if "--check" not in argv:
            tmp = path.with_name(f".{path.name}.tmp")
            tmp.write_text(text)
            os.replace(tmp, path)
    if "--check" in argv:
        if differ:
            print(
                f"generated cells out of date in {', '.join(differ)}: run python book/sync.py",
                file=sys.stderr,
            )
        return bool(differ)
    print(
        f"filled the generated cells of {', '.join(differ)}" if differ else "generated cells are up to date"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
