"""The tasks of Part II: their answers are where they should be, unique, and the same for the same seed."""

import pytest
import torch

from lcx.errors import LcxError
from lcx.tasks.dictionary import ASK, BOS, CONTENT, DEFINE, RECORD, VALUE, dictionary
from lcx.tasks.needle_copy import FILLER, NEEDLE, needle_chunks
from lcx.tasks.topic import VOCAB_SIZE, topic_documents


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def records(chunk, mark):
    """(key, value) pairs of a chunk, read token by token."""
    found, tokens = [], chunk.tolist()
    for i, t in enumerate(tokens):
        if t == mark:
            assert tokens[i + 5] == VALUE
            found.append((tuple(tokens[i + 1 : i + 5]), tuple(tokens[i + 6 : i + 10])))
    return found


@pytest.mark.parametrize(("chunk", "fit"), [(64, 6), (256, 25), (11, 1)])
def test_dictionary_asks_for_what_it_defined(chunk, fit):
    ids, labels = dictionary(20, chunk, generator=generator())
    assert ids.shape == labels.shape == (20, 2, chunk) and (ids[:, :, 0] == BOS).all()
    every = []
    for doc, marks in zip(ids, labels, strict=True):
        defined, asked = records(doc[0], DEFINE), records(doc[1], ASK)
        assert len(defined) == len(asked) == fit and sorted(defined) == sorted(asked)
        assert (marks[0] == -100).all() and (marks[1] != -100).sum() == 4 * fit
        scored = marks[1] != -100
        assert torch.equal(marks[1][scored], doc[1][scored])
        assert [tuple(v) for v in marks[1][scored].view(-1, 4).tolist()] == [v for _, v in asked]
        every += [k for k, _ in defined]
        assert set(doc.flatten().tolist()) <= {BOS, DEFINE, ASK, VALUE, *CONTENT}
    assert len(set(every)) == len(every), "a key that stands twice would have two answers"
    assert any(records(d[0], DEFINE) != records(d[1], ASK) for d in ids) or fit == 1, "asked in another order"


def test_few_keys_repeat_and_only_first_questions_are_scored():
    ids, labels = dictionary(30, 64, keys=2, generator=generator())
    for doc, marks in zip(ids, labels, strict=True):
        assert len(set(records(doc[0], DEFINE))) == 2
        asked, seen = records(doc[1], ASK), set()
        for i, (key, _) in enumerate(asked):
            scored = (marks[1, 1 + i * RECORD : 1 + (i + 1) * RECORD] != -100).sum()
            assert scored == (0 if key in seen else 4)
            seen.add(key)


def test_a_memory_of_262144_tokens_has_no_key_twice():
    ids, _ = dictionary(4096, 64, generator=generator())
    starts = (ids[:, 0] == DEFINE).nonzero(as_tuple=True)
    keys = torch.stack([ids[starts[0], 0, starts[1] + i] for i in range(1, 5)], 1)
    assert len(keys) == 4096 * 6 == len(keys.unique(dim=0))


@pytest.mark.parametrize("needles", [1, 2, 3])
def test_needles_stand_in_the_first_chunk_and_come_back_in_the_second(needles):
    ids, labels = needle_chunks(50, needles=needles, cue=4, generator=generator())
    orders = set()
    for doc, marks in zip(ids, labels, strict=True):
        halves = []
        for half in doc:
            tokens = [t for t in half.tolist() if t in NEEDLE]
            assert len(tokens) == 16 * needles
            halves.append([tuple(tokens[i : i + 16]) for i in range(0, len(tokens), 16)])
            assert all(t in FILLER for t in half[1:].tolist() if t not in NEEDLE)
        assert sorted(halves[0]) == sorted(halves[1])
        assert all(len(set(n)) == 16 for n in halves[0]), "the tokens of a needle are distinct"
        orders.add(halves[0] == halves[1])
        assert (marks[0] == -100).all()
        assert [tuple(m) for m in marks[1][marks[1] != -100].view(needles, 12).tolist()] == [
            n[4:] for n in halves[1]
        ]
    assert orders == ({True} if needles == 1 else {True, False})


def test_fewer_types_make_documents_alike():
    for types in (16, 40):
        ids, _ = needle_chunks(20, types=types, generator=generator(types))
        assert len({t for t in ids.flatten().tolist() if t in NEEDLE}) == types
    one, two = (needle_chunks(5, types=16, generator=generator(s))[0] for s in (1, 2))
    assert set(one.flatten().tolist()) != set(two.flatten().tolist()), "other types in every call"


def test_cues_of_four_are_unique_in_a_large_memory():
    """What makes 262,144 tokens fair: four tokens of a needle hardly ever stand in the memory twice."""
    ids, _ = needle_chunks(4096, generator=generator(5))
    flat = ids[:, 0]
    is_needle = flat >= NEEDLE.start
    runs = is_needle.unfold(1, 4, 1).all(-1)
    cues = flat.unfold(1, 4, 1)[runs]
    _, counts = cues.unique(dim=0, return_counts=True)
    assert (counts == 1).sum() / counts.sum() > 0.97


def test_topics_are_the_documents_own():
    docs = topic_documents(200, 400, generator())
    assert docs.shape == (200, 400) and docs.min() >= 0 and docs.max() < VOCAB_SIZE
    counts = torch.nn.functional.one_hot(docs, VOCAB_SIZE).float().mean(1)
    top = counts.sort(1, descending=True).values[:, :10].sum(1).mean()
    assert 0.8 < top < 0.95, "ten tokens make up most of a document"
    first, second = (torch.nn.functional.one_hot(d, VOCAB_SIZE).float().mean(1) for d in docs.split(200, 1))
    own = (first * second).sum(1).mean()
    other = (first * second.roll(1, 0)).sum(1).mean()
    assert own > 3 * other


@pytest.mark.parametrize(
    "make", [lambda g: dictionary(4, 64, generator=g), lambda g: needle_chunks(4, generator=g)]
)
def test_the_same_seed_gives_the_same_and_no_global_state_is_touched(make):
    state = torch.get_rng_state()
    (a, _), (b, _), (c, _) = make(generator(1)), make(generator(1)), make(generator(2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "call",
    [
        lambda: dictionary(1, 10),
        lambda: dictionary(1, 64, keys=7),
        lambda: dictionary(10**6, 64),
        lambda: needle_chunks(1, needles=4),
        lambda: needle_chunks(1, types=15),
        lambda: needle_chunks(1, cue=16),
        lambda: topic_documents(0, 5),
    ],
)
def test_impossible_sizes_give_one_line(call):
    with pytest.raises(LcxError) as e:
        call()
    assert "\n" not in str(e.value) and ":" in str(e.value)
