"""Checks of chapter 5, Contrastive training."""

import torch

from ..methods.focused import crossbatch_contexts, crossbatch_schedule, lane_contexts, positive_share
from . import exercise


@exercise("05-schedule")
def _(schedule):
    for chunks, context_range in [(4, 3), (4, 6), (4, 7), (2, 2), (8, 7), (3, 1), (2, 0)]:
        got, call = schedule(chunks, context_range), f"schedule({chunks}, {context_range})"
        want = crossbatch_schedule(chunks, context_range)
        assert isinstance(got, list) and len(got) == chunks, f"{call}: return a list of {chunks} pairs"
        for chunk, (pair, expected) in enumerate(zip(got, want, strict=True)):
            assert tuple(pair) == expected, (
                f"{call}: chunk {chunk} looks back {sum(expected)} entries, {expected[0]} of them its own, "
                f"so the pair is {expected}, not {tuple(pair)}"
            )


@exercise("05-share")
def _(share):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(6, 2, 5, 1 + 4, generator=generator).square()
    mass = mass / mass.sum(-1, keepdim=True)
    for positives in (1, 2):
        got, want = float(share(mass, positives)), positive_share(mass, positives).mean().item()
        window = (mass[..., 1 : 1 + positives].sum(-1) / mass.sum(-1)).mean().item()
        of_means = positive_share(mass.mean((0, 1, 2)), positives).item()
        assert abs(got - window) > 1e-4, (
            "the window (index 0) does not count: leave it out of the denominator"
        )
        assert abs(got - of_means) > 1e-6, (
            "take the ratio for every query first, and the mean of the ratios last"
        )
        assert abs(got - want) < 1e-5, f"with {positives} positives the share is {want:.4f}, not {got:.4f}"


@exercise("05-cost")
def _(extra):
    S = 32
    cases = {
        "no contexts": torch.full((4, 2), -1),
        "lanes of 8 documents, d = 4": lane_contexts(8, 4),
        "packs of 4, range 3": crossbatch_contexts(crossbatch_schedule(4, 3), 16),
    }
    for name, contexts in cases.items():
        pairs = int((contexts >= 0).sum())
        want = 1 + pairs * S * S / (len(contexts) * S * (S + 1) / 2)
        got = float(extra(contexts, S))
        assert abs(got - want) < 1e-6, (
            f"{name}, {S} tokens an entry: {want:.3f} times the scores, not {got:.3f}"
        )


@exercise("05-leak")
def _(sees_future):
    schedule = crossbatch_schedule(4, 7, stepping=False)
    wrapped = torch.tensor([[(b - 1 - i) % 8 for i in range(7)] for b in range(8)])
    own_later = (wrapped // 4 == torch.arange(8)[:, None] // 4) & (wrapped > torch.arange(8)[:, None])
    half = torch.where(own_later, -1, wrapped)
    chain = torch.full((6, 1), -1)
    chain[0], chain[4], chain[2] = (
        4,
        2,
        1,
    )  # 0 sees 4, 4 sees 2, 2 sees 1: three layers to reach its own chunk 1
    cases = [
        ("crossbatch_contexts", crossbatch_contexts(schedule, 16), 4, 3, False),
        ("no contexts", torch.full((8, 1), -1), 4, 3, False),
        ("an entry that sees its own next chunk", wrapped, 4, 1, True),
        ("own later chunks left out, one layer", half, 4, 1, False),
        ("own later chunks left out, two layers", half, 4, 2, True),
        ("a chain over two other documents, two layers", chain, 2, 2, False),
        ("a chain over two other documents, three layers", chain, 2, 3, True),
    ]
    for name, contexts, chunks, layers, want in cases:
        got = sees_future(contexts, chunks, layers)
        assert bool(got) is want, f"{name}: the answer is {want}, you said {bool(got)}"
