"""Checks of chapter 7, The grouped softmax."""

import torch

from ..landmark_tokens import insert_landmarks, landmark_labels
from ..methods.landmark import grouped_softmax
from . import exercise


@exercise("07-insert")
def _(insert):
    for count, block_size in [(6, 4), (7, 4), (10, 4), (2, 4), (0, 4), (5, 2), (126, 64)]:
        ids = list(range(10, 10 + count))
        got, call = insert(list(ids), block_size, 9), f"insert of {count} tokens, block_size {block_size}"
        want = insert_landmarks(torch.tensor(ids, dtype=torch.int64), block_size, 9).tolist()
        assert isinstance(got, list), f"{call}: return a list"
        assert [x for x in got if x != 9] == ids, (
            f"{call}: without the landmarks, the text must be what it was"
        )
        assert got.count(9) == want.count(9), (
            f"{call}: {want.count(9)} landmarks, not {got.count(9)}; a block has {block_size - 1} tokens of the text"
        )
        assert got == want, (
            f"{call}: landmarks stand at positions {[i for i, x in enumerate(want) if x == 9]}"
        )


@exercise("07-equal")
def _(equal_weights):
    for block_size in (2, 3, 4, 64):
        for i in sorted({0, 1, 2, 5, block_size - 1, block_size, 3 * block_size + 1, 4 * block_size - 1}):
            got = equal_weights(i, block_size)
            weights = grouped_softmax(torch.zeros(1, i + 1, dtype=torch.float64), block_size)[0]
            own = weights[i // block_size * block_size].item()
            earlier = weights[0].item() if i >= block_size else 0.0
            call = f"equal_weights({i}, {block_size})"
            assert len(got) == 2, f"{call}: return two weights"
            assert abs(got[0] - own) < 1e-9, (
                f"{call}: a token of the own block has {own:.4f}, not {got[0]:.4f}"
            )
            assert abs(got[1] - earlier) < 1e-9, (
                f"{call}: a token of an earlier block has {earlier:.4f}, not {got[1]:.4f}"
            )


@exercise("07-targets")
def _(targets):
    for text, block_size in [("abcdefg", 4), ("abcdef", 4), ("abc", 4), ("abcde", 2), ("a", 4)]:
        ids = torch.tensor([ord(c) for c in text])
        with_landmarks = insert_landmarks(ids, block_size, 0).tolist()
        got, want = targets(list(with_landmarks), 0), landmark_labels(ids, block_size).tolist()
        show = " ".join(chr(x) if x else "▮" for x in with_landmarks)
        assert len(got) == len(want), f"{show}: one target for each position, {len(want)} in all"
        for place, (x, y) in enumerate(zip(got, want, strict=True)):
            words = "nothing (-100)" if y == -100 else f"{chr(y)!r}"
            assert x == y, f"{show}: position {place} predicts {words}"


@exercise("07-open")
def _(attend):
    generator = torch.Generator().manual_seed(0)
    for tokens, block_size, k in [(12, 4, 3), (11, 4, 1), (9, 3, 1), (17, 4, 2), (3, 4, 2), (16, 4, 0)]:
        row = torch.randn(tokens, generator=generator, dtype=torch.float64)
        v = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
        before = row.clone()
        got, call = attend(row, v, block_size, k), f"{tokens} tokens, block_size {block_size}, k = {k}"
        assert torch.equal(row, before), f"{call}: leave the scores you were given as they are"
        earlier = (tokens - 1) // block_size
        ends = [b * block_size + block_size - 1 for b in range(earlier)]
        opened = sorted(ends, key=lambda end: -before[end].item())[:k]
        main = [j for j in range(earlier * block_size, tokens) if j % block_size != block_size - 1]
        p = before[main + opened].softmax(0)
        want = p[: len(main)] @ v[main]
        for share, end in zip(p[len(main) :], opened, strict=True):
            inside = slice(end - block_size + 1, end)
            want = want + share * (before[inside].softmax(0) @ v[inside])
        assert got.shape == want.shape, f"{call}: return {list(want.shape)}, not {list(got.shape)}"
        assert (got - want).abs().max() < 1e-9, f"{call}: off by {(got - want).abs().max():.3f}"
