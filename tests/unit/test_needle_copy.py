"""The task as its specification words it: layout, depth, labels, one right answer, no global state."""

import pytest
import torch

from lcx.errors import LcxError
from lcx.tasks.needle_copy import BOS, FILLER, NEEDLE, VOCAB_SIZE, needle_copy


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def starts(input_ids, needle):
    """The place of the first needle token of every row."""
    return (input_ids[:, :-needle] >= NEEDLE.start).int().argmax(1)


@pytest.mark.parametrize(("length", "needle"), [(64, 16), (33, 16), (512, 16), (40, 2), (200, 64)])
def test_layout_and_labels(length, needle):
    ids, labels = needle_copy(32, length, needle=needle, generator=gen())
    assert ids.shape == labels.shape == (32, length) and ids.dtype == labels.dtype == torch.int64
    for row, label, s in zip(ids.tolist(), labels.tolist(), starts(ids, needle).tolist(), strict=True):
        inserted = row[s : s + needle]
        assert row[0] == BOS and inserted == row[-needle:]
        assert len(set(inserted)) == needle and all(t in NEEDLE for t in inserted)
        filler = row[1:s] + row[s + needle : -needle]
        assert len(filler) == length - 1 - 2 * needle and all(t in FILLER for t in filler)
        # Scored: the repeat from its second token on. Each target follows the only earlier place of its predecessor.
        assert label == [-100] * (length - needle + 1) + row[length - needle + 1 :]
        for t in range(length - needle + 1, length):
            earlier = [i for i in range(t - 1) if row[i] == row[t - 1]]
            assert len(earlier) == 1 and row[earlier[0] + 1] == row[t]


def test_vocabulary_is_81():
    assert VOCAB_SIZE == 1 + len(FILLER) + len(NEEDLE) == 81
    ids, _ = needle_copy(512, 64, generator=gen())
    assert set(ids.flatten().tolist()) == set(range(81))


@pytest.mark.parametrize(("depth", "start"), [(0.0, 1), (0.5, 1 + round(0.5 * 95)), (1.0, 96)])
def test_needle_stands_where_depth_says(depth, start):
    ids, _ = needle_copy(8, 128, depth=depth, generator=gen())
    assert starts(ids, 16).tolist() == [start] * 8


def test_without_depth_every_place_occurs():
    ids, _ = needle_copy(2000, 64, generator=gen())
    assert set(starts(ids, 16).tolist()) == set(range(1, 33))


def test_same_generator_same_sequences_and_no_global_state():
    before = torch.get_rng_state()
    a, b, c = (needle_copy(4, 64, generator=gen(s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(needle_copy(4, 64)[0], needle_copy(4, 64)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"length": 32}, "use at least 33"),
        ({"length": 64, "needle": 1}, "use 2 to 64"),
        ({"length": 640, "needle": 65}, "use 2 to 64"),
        ({"length": 64, "depth": 1.5}, "outside 0 to 1"),
    ],
)
def test_bad_input_is_one_clear_line(how, words):
    with pytest.raises(LcxError, match=words):
        needle_copy(2, **how)
