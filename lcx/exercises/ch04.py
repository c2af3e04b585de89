"""Checks of chapter 4, The distraction issue."""

import math

import torch

from ..methods.focused import crossbatch_attention, lane_contexts
from . import exercise


@exercise("04-fewer")
def _(fewer):
    g = torch.Generator().manual_seed(4)
    q, k = (torch.randn(12, 2, 5, 8, generator=g, dtype=torch.float64) for _ in range(2))

    def masses(d: int) -> torch.Tensor:
        return crossbatch_attention(q, k, k, lane_contexts(6, d), return_mass=True)[1][6:]

    recorded = masses(6)
    before = recorded.clone()
    for d in (1, 2, 5, 6):
        got = fewer(recorded, d)
        assert isinstance(got, torch.Tensor) and got.shape == (6, 2, 5, 1 + d), (
            f"with d={d} return a tensor [..., {1 + d}]: the window and {d} documents"
        )
        assert torch.allclose(got.sum(-1), torch.ones_like(got[..., 0])), (
            f"d={d}: window and documents are all that is left to see, so the masses must sum to 1"
        )
        assert torch.allclose(got, masses(d)), (
            f"d={d}: an attention over only {d} documents gives other masses"
        )
    assert torch.equal(recorded, before), "leave the recording as it is: do not change `mass` in place"


@exercise("04-margin")
def _(margin):
    for m in (-1.5, 0.0, 0.3, 2.0, 6.0):
        for d in (2, 8, 64, 1000):
            r = math.exp(m) / (math.exp(m) + d - 1)
            got = float(margin(r, d))
            assert abs(got - m) < 1e-6, f"r = {r:.4f} among {d} documents: the margin is {m}, not {got:.4f}"


@exercise("04-contexts")
def _(contexts):
    for documents, d in ((4, 1), (4, 3), (5, 5), (1, 1)):
        got = contexts(documents, d)
        where = f"{documents} documents, d={d}"
        assert isinstance(got, torch.Tensor) and got.shape == (2 * documents, d), (
            f"{where}: return a tensor [{2 * documents}, {d}]"
        )
        assert got.dtype == torch.int64, f"{where}: entries are named by int64, not {got.dtype}"
        assert (got[:documents] == -1).all(), f"{where}: the previous chunks see nobody, their rows are -1"
        own = got[documents:, 0]
        assert own.tolist() == list(range(documents)), (
            f"{where}: first comes the previous chunk of the own document, entry i for document i"
        )
        assert torch.equal(got, lane_contexts(documents, d)), (
            f"{where}: after the own document come the next ones, around the end"
        )
