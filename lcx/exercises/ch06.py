"""Checks of chapter 6, A memory of 262,144 tokens."""

import math

import torch

from ..memory import Memory
from . import exercise


@exercise("06-tokens-that-fit")
def _(tokens_that_fit):
    for nbytes, layers, heads, size, itemsize in [
        (8 * 2**30, 3, 32, 100, 2),
        (2**30, 1, 4, 16, 4),
        (49_151, 3, 32, 128, 2),
        (49_152, 3, 32, 128, 2),
    ]:
        got = tokens_that_fit(nbytes, layers, heads, size, itemsize)
        each = 2 * layers * heads * size * itemsize
        call = f"tokens_that_fit({nbytes:,}, {layers}, {heads}, {size}, {itemsize})"
        assert got != 2 * (nbytes // each) or got == 0, f"{call}: keys and values both need room"
        assert got == nbytes // each, f"{call} should be {nbytes // each:,}, not {got:,}"
        assert isinstance(got, int), f"{call}: return a whole number, not {type(got).__name__}"


@exercise("06-margin")
def _(margin):
    for slots, share in [(2, 0.5), (64, 0.9), (4096, 0.5), (262_144, 0.99)]:
        got = float(margin(slots, share))
        want = math.exp(got) / (math.exp(got) + slots - 1)
        assert abs(want - share) < 1e-6, (
            f"margin({slots}, {share}) = {got:.3f} gives a share of {want:.4f}, not {share}"
        )


def _run(prompt: int, more: int, window: int, last_context: int, overflow: str) -> tuple[int, int]:
    """What a real, tiny model does: (tokens in the memory, local tokens)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..focused import FocusedAttention

    with torch.random.fork_rng():
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=64, **sizes)).eval()
    ids = torch.arange(prompt + more)[None] % 8
    settings = FocusedAttention((0,), window=window, last_context=last_context, overflow=overflow)
    with settings(model) as focused, torch.no_grad():
        cache = focused.new_cache()
        model(ids[:, :prompt], past_key_values=cache)
        for t in range(prompt, prompt + more):
            model(ids[:, t : t + 1], past_key_values=cache)
    return len(cache.memory), int(cache.mask.sum())


@exercise("06-where")
def _(where):
    for prompt, more, window, last in [
        (22, 14, 8, 6),
        (5, 2, 8, 6),
        (8, 1, 8, 8),
        (30, 19, 8, 3),
        (6, 0, 8, 6),
    ]:
        for overflow in ("flush", "roll"):
            call = f"where({prompt}, {more}, {window}, {last}, {overflow!r})"
            got, want = (
                where(prompt, more, window, last, overflow),
                _run(prompt, more, window, last, overflow),
            )
            assert isinstance(got, tuple | list) and len(got) == 2, f"{call}: return (in_memory, local)"
            assert sum(got) == prompt + more, (
                f"{call}: {prompt + more} tokens were read, yours are {sum(got)}: none is lost, none is there twice"
            )
            assert tuple(got) == want, f"{call}: the model has {want}, not {tuple(got)}"


@exercise("06-top-k")
def _(top_k_attention):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (5, 40, 40))
    for best in (1, 4, 39):
        memory = Memory((0,), top_k=best)
        memory.append({0: (k[None, None], v[None, None])})
        want, want_lse = (x[0, 0] for x in memory.attend(0, q[None, None], 0.25))
        got, lse = top_k_attention(q, k, v, best, 0.25)
        assert got.shape == (5, 16) and lse.shape == (5,), (
            f"with q [5, 16] return out [5, 16] and lse [5], not {list(got.shape)} and {list(lse.shape)}"
        )
        assert torch.allclose(got, want), (
            f"best={best}: the output is not the softmax over the {best} best slots"
        )
        everything = (q @ k.T * 0.25).logsumexp(-1)
        assert not torch.allclose(lse, everything), "lse is that of the found scores, not of all"
        assert torch.allclose(lse, want_lse), (
            f"best={best}: lse should be {want_lse[0]:.3f} for the first query"
        )
