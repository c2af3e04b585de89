"""The page on related work: its measured tables are those of the committed results, its map names what it describes."""

import json
import re
import runpy
from pathlib import Path
from statistics import mean

import pytest

BOOK = Path(__file__).resolve().parents[2] / "book"
LENGTHS = ("64", "512")


@pytest.fixture(scope="module")
def page():
    return (BOOK / "related-work.md").read_text("utf-8")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(BOOK / "measured.py"))


def block(page, name):
    """The rows of a measured table below its rule, each a list of cells; none if nothing was measured."""
    text = re.search(rf"<!-- measured {name} -->\n(.*?)<!-- end -->", page, re.S)[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def committed(name):
    path = BOOK / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def test_tables_are_made_from_the_committed_results(page, script):
    assert script["filled"](page) == page, "outdated: run python book/measured.py"
    assert re.findall(r"<!-- measured (\w+) -->", page) == list(script["TABLES"])


@pytest.mark.parametrize(("name", "where"), [("cream-needles", "needles"), ("cream-64x", "far")])
def test_needles_are_the_means_of_the_measured_rows(page, script, name, where):
    """Counted here from the rows of each seed, not from the summary in the file."""
    if (data := committed(name)) is None:
        return  # the page says so: see the test above
    shown = {cells[0]: cells[1:] for cells in block(page, where)}
    by_arm = {}
    for r in data["rows"]:
        by_arm.setdefault((r["arm"], r["scaling"]), []).append(r["accuracy"])
    names = {
        script["label"](*arm): accuracies
        for arm, accuracies in by_arm.items()
        if arm[0] in script["ARMS"] and arm[1] in ("none", "yarn", "selfextend")
    }
    assert shown.keys() == names.keys() and len(shown) > 5
    for label, mine in names.items():
        true = [100 * mean(mean(a[n]) for a in mine) for n in mine[0]]
        assert [float(x) for x in shown[label][:-1]] == pytest.approx(true, abs=0.051), label
        assert re.search(r"\((\d+) seeds?\)$", shown[label][-1])[1] == str(len(mine))


@pytest.mark.parametrize(("name", "where"), [("cream-needles", "pairs"), ("cream-64x", "farpairs")])
def test_differences_are_paired_by_seed(page, name, where):
    if (data := committed(name)) is None:
        return
    longest = str(data["window"] * data["factor"])
    rows = {tuple(cells[:3]): cells for cells in block(page, where)}
    by = {(r["arm"], r["seed"]): r["accuracy"][longest] for r in data["rows"] if r["scaling"] == "yarn"}
    seeds = sorted({s for arm, s in by if arm == "cream"} & {s for arm, s in by if arm == "pose"})
    for depths, part in (("all", slice(0, 9)), ("middle", slice(3, 6))):
        gains = [mean(by["cream", s][part]) - mean(by["pose", s][part]) for s in seeds]
        cells = rows["CREAM − PoSE", "YaRN", depths]
        assert float(cells[3]) == pytest.approx(100 * mean(gains), abs=0.051)
        assert cells[5] == f"{sum(g > 0 for g in gains)} of {len(seeds)}"


def test_text_losses_are_means_over_positions_and_seeds(page, script):
    if (data := committed("cream-text")) is None:
        return
    rows = {cells[0]: cells for cells in block(page, "text")}
    runs = {}
    for r in data["rows"]:
        runs.setdefault(script["label"](r["arm"], r["scaling"]), []).append(r["nll"])
    assert rows.keys() == runs.keys()
    for name, mine in runs.items():
        last = mean(mean(nll[12:]) for nll in mine)
        assert float(rows[name][3]) == pytest.approx(last, abs=0.0051) and int(rows[name][4]) == len(mine)


def test_what_the_page_says_of_the_labels_is_what_was_measured(page):
    assert (
        "within two points of each other at eight times" in page
        and "at sixty-four times CREAM is behind" in page
    )
    assert "no other sampler is clearly ahead" in page
    if data := committed("cream-needles"):
        at = {(r["arm"], r["scaling"]): r for r in data["means"] if r["length"] == 512}
        assert at["zero-shot", "selfextend"]["mean"] > at["zero-shot", "yarn"]["mean"]
        assert all(abs(at["cream", s]["mean"] - at["pose", s]["mean"]) < 0.02 for s in ("yarn", "linear"))
        assert at["ordinary", "yarn"]["mean"] < at["zero-shot", "yarn"]["mean"]
        samplers = [r["mean"] for (arm, s), r in at.items() if s == "yarn" and arm not in ("pose", "full")]
        assert max(samplers) < at["pose", "yarn"]["mean"] + 0.01
    if data := committed("cream-64x"):
        pairs = {(r["a"], r["b"]): r for r in data["paired"] if (r["length"], r["depths"]) == (4096, "all")}
        at = {r["arm"]: r["mean"] for r in data["means"] if r["length"] == 4096}
        assert max(at["zero-shot"], at["ordinary"], at["cream-released"]) < 0.5 < min(at["pose"], at["cream"])
        assert pairs["cream", "pose"]["high"] < 0 and pairs["cream", "cream-uniform"]["high"] < 0


def test_made_up_results_come_through(script, tmp_path, monkeypatch):
    """The same code on results that are known: what is there is shown, what is not is called not run."""
    accuracy = {"cream": 0.8, "pose": 0.6}
    means = [
        {"arm": arm, "scaling": "yarn", "length": int(n), "mean": a, "low": a - 0.1, "high": a + 0.1, "seeds": 8}
        for arm, a in accuracy.items()
        for n in LENGTHS
    ]  # fmt: skip
    paired = [
        {"scaling": "yarn", "a": "cream", "b": "pose", "length": 512, "depths": "all", "mean": 0.2, "low": -0.05, "high": 0.45,
         "wins": 7, "seeds": 8}
    ]  # fmt: skip
    data = {"window": 64, "factor": 8, "steps": 300, "batch_size": 32, "means": means, "paired": paired}
    (tmp_path / "cream-needles.json").write_text(json.dumps(data))
    monkeypatch.setattr("lcx.results.results_dir", lambda: tmp_path)
    page = "".join(f"<!-- measured {name} -->\nold\n<!-- end -->\n" for name in script["TABLES"])
    made = script["filled"](page)
    assert block(made, "needles") == [
        ["YaRN, PoSE", "60.0", "60.0", "50.0 to 70.0 (8 seeds)"],
        ["YaRN, CREAM", "80.0", "80.0", "70.0 to 90.0 (8 seeds)"],
    ]
    assert block(made, "pairs") == [["CREAM − PoSE", "YaRN", "all", "+20.0", "-5.0 to 45.0", "7 of 8"]]
    assert made.count("Not run yet: `lcx measure ") == 5 and "old" not in made


def test_every_work_of_the_map_has_a_paragraph(page):
    table = page.partition("## The map")[2].partition("## When")[0]
    named = [
        name.strip()
        for line in table.splitlines()
        if line.startswith("| **")
        for name in re.split(r"[,;]", line.strip("| ").split("|")[-1])
    ]
    assert len(named) > 18
    short = {"PI": "Position interpolation", "retrieval": "Retrieval meets long context"}
    for name in named:
        entry = re.search(rf"^\*\*{re.escape(short.get(name, name))}\*\*.*(?:\n(?!\n).*)*", page, re.M)
        assert entry, f"{name}: no paragraph"
        assert "*Pick it*" in entry[0] or "*Pick* both" in entry[0], name
        assert "](https://" in entry[0], f"{name}: no link to the work"
