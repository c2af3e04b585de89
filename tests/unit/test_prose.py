"""The pages that are prose keep to the facts they name: picture, bibliography, glossary, set-up."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer.main

from lcx.cli import app
from lcx.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
PROSE = sorted(BOOK.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOI = re.compile(r"https://doi\.org/[^\s)\"]+")
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.I)


def words(path: Path) -> str:
    """What a reader sees of a page or a notebook, the code of a notebook included."""
    if path.suffix == ".md":
        return path.read_text("utf-8")
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"])


# ---- the picture


def test_picture_is_the_one_its_script_draws():
    script = runpy.run_path(str(BOOK / "picture.py"))
    assert script["PICTURE"].read_bytes() == script["draw"]().encode(), "outdated: run python book/picture.py"


def test_picture_can_be_read_without_eyes_and_in_the_dark():
    root = ElementTree.parse(BOOK / "_static" / "picture.svg").getroot()
    text = {element.tag.partition("}")[2]: (element.text or "") for element in root.iter()}
    named = {element.get("id") for element in root.iter()}
    assert len(text["title"]) > 20 and len(text["desc"]) > 200
    assert set(root.get("aria-labelledby").split()) <= named
    assert "prefers-color-scheme:dark" in text["style"]
    assert "Schematic" in text["desc"] and "nothing in this picture is measured" in text["text"]


def test_every_picture_of_a_page_has_alt_text():
    for page in PROSE:
        for block in re.findall(r"```\{(?:image|figure)\}.*?```", page.read_text("utf-8"), re.S):
            assert re.search(r"^:alt: .{30,}", block, re.M), f"{page.name}: {block.splitlines()[0]}"


# ---- the bibliography


@pytest.fixture(scope="module")
def entries():
    bibtex = pytest.importorskip("pybtex.database.input.bibtex", reason="comes with the extra 'book'")
    return bibtex.Parser().parse_file(str(BOOK / "references.bib")).entries


def test_bibliography_keys_are_unique():
    keys = re.findall(r"^@\w+\{\s*([^,\s]+)", (BOOK / "references.bib").read_text("utf-8"), re.M)
    assert len(keys) > 30
    assert sorted(k.lower() for k in keys) == sorted({k.lower() for k in keys})


def test_bibliography_entries_are_complete(entries):
    for key, entry in entries.items():
        assert entry.fields.get("title") and entry.persons.get("author"), key
        assert re.fullmatch(r"(19|20)\d\d", entry.fields.get("year", "")), key
        assert entry.fields.get("eprint") or entry.fields.get("url"), f"{key}: no way to find it"
        if "eprint" in entry.fields:
            assert entry.fields.get("archiveprefix") == "arXiv", key
            assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.fields["eprint"]), key
            # arXiv numbers begin with year and month: a paper is never printed before it is there
            assert int(entry.fields["year"]) - 2000 >= int(entry.fields["eprint"][:2]), key
        assert entry.fields["year"] in key or key == "bloc2023ntk", f"{key}: first author, year, first word"


def test_bibliography_has_every_paper_once(entries):
    numbers = [e.fields["eprint"] for e in entries.values() if "eprint" in e.fields]
    assert len(numbers) == len(set(numbers))
    titles = [re.sub(r"\W", "", e.fields["title"]).lower() for e in entries.values()]
    assert len(titles) == len(set(titles))


def test_every_linked_paper_is_in_the_bibliography(entries):
    known = {e.fields[f].lower() for e in entries.values() for f in ("eprint", "url") if f in e.fields}
    missing = {
        f"{page.name} links to {paper}"
        for page in [*PROSE, *NOTEBOOKS, ROOT / "README.md"]
        for paper in [*ARXIV.findall(words(page)), *DOI.findall(words(page))]
        if paper.lower() not in known
    }
    assert not missing, f"add to book/references.bib: {sorted(missing)}"


# ---- the glossary


def test_glossary_terms_are_sorted_and_have_two_sentences():
    body = (BOOK / "glossary.md").read_text("utf-8").partition("```{glossary}\n")[2].rpartition("```")[0]
    terms = re.findall(r"^(\S.*)\n    (\S.*)$", body, re.M)
    names = [term.lower() for term, _ in terms]
    assert len(names) >= 35 and len(names) == len(set(names))
    assert names == sorted(names, key=lambda name: re.sub(r"[\W_]", "", name))
    for term, text in terms:
        assert len(re.split(r"(?<=[.!?]) (?=\S)", text)) == 2 and text.endswith("."), term


# ---- the front page


def test_front_page_names_every_chapter_by_its_title():
    page = (BOOK / "index.md").read_text("utf-8")
    for number, notebook in enumerate(NOTEBOOKS, 1):
        title = re.search(r"^# (.+)$", words(notebook), re.M)[1]
        assert f"[{number} {title}](../notebooks/{notebook.name})" in page


# ---- set-up: nothing is promised that is not there


def test_profiles_of_the_page_are_those_of_the_package():
    page = (BOOK / "setup.md").read_text("utf-8")
    rows = re.findall(r"^\| `(smoke|book|colab|full)` \| (.*?) \| (.*?) \|$", page, re.M)
    assert [(name, (what, time)) for name, what, time in rows] == list(PROFILES.items())


def test_commands_of_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.M))
    command = typer.main.get_command(app)
    for page in [*PROSE, ROOT / "README.md"]:
        code = "\n".join(re.findall(r"`+[^`]+`+", page.read_text("utf-8")))
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
            assert target in targets, f"{page.name}: make {target}"
        for call in re.findall(r"\blcx ((?:[a-z]+ ?)+)", code):
            here = command
            for part in call.split():
                if not hasattr(here, "commands"):
                    break  # arguments begin
                assert part in here.commands, f"{page.name}: lcx {call}"
                here = here.commands[part]
        for option in re.findall(r"\blcx measure (--[a-z]+)", code):
            assert any(option in p.opts for p in command.commands["measure"].params), f"{page.name}: {option}"


def test_variables_of_the_pages_are_read_somewhere():
    code = "\n".join(p.read_text("utf-8") for p in (ROOT / "lcx").rglob("*.py"))
    for page in [*PROSE, ROOT / "README.md"]:
        for name in set(re.findall(r"\bLCX_[A-Z]+\b", page.read_text("utf-8"))):
            assert name in code, f"{page.name}: {name}"


def test_errors_of_the_set_up_page_exist():
    import lcx.errors

    for name in re.findall(r"`(\w+Error)`", (BOOK / "setup.md").read_text("utf-8")):
        assert issubclass(getattr(lcx.errors, name), lcx.errors.LcxError)
