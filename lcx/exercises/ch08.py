"""Checks of chapter 8, Retrieving blocks through landmarks."""

import torch

from ..errors import LcxError
from ..methods.retrieval import choose_blocks, distances
from . import exercise


def _window(train_length: int, block_size: int, top_k: int) -> int:
    """What LandmarkAttention takes as its window for a model of these sizes, 0 if it refuses."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..landmark import LandmarkAttention

    with torch.random.fork_rng():
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=train_length, **sizes))
    try:
        with LandmarkAttention(block_size, top_k, landmark_id=7)(model) as landmark:
            return landmark.settings.window
    except LcxError:
        return 0


@exercise("08-chunk")
def _(largest_chunk):
    for sizes in [
        (256, 16, 4),
        (512, 51, 5),
        (512, 51, 4),
        (2048, 64, 5),
        (100, 16, 5),
        (95, 16, 4),
        (64, 16, 3),
    ]:
        got, want = largest_chunk(*sizes), _window(*sizes)
        call = "largest_chunk({}, {}, {})".format(*sizes)
        assert isinstance(got, int), f"{call}: return a whole number, not {type(got).__name__}"
        assert got % sizes[1] == 0, f"{call} = {got} is no multiple of the block size"
        assert got == want, f"{call} should be {want}, not {got}: k + 1 slots of a whole block come off"


@exercise("08-seen-at")
def _(seen_at):
    for n, top_k, size, chosen, at in [
        (5, 2, 16, [0, 1], 0),
        (5, 2, 16, [1, 3], 5),
        (5, 2, 4, [3, 4], 0),
        (10, 4, 64, [2, 3, 6, 9], 30),
        (3, 4, 16, [0, 1, 2], 7),
        (2048, 2, 16, [17, 2047], 175),
    ]:
        k = min(top_k, n)
        back = distances(torch.tensor(chosen)[None, None, None], torch.arange(n - k, n)[None]).flatten()
        want = (at + (back - 1) * size + 1).tolist()
        call = f"seen_at({n}, {top_k}, {size}, {chosen}, {at})"
        got = seen_at(n, top_k, size, chosen, at)
        assert isinstance(got, list | tuple) and len(got) == len(chosen), (
            f"{call}: one number for each chosen block"
        )
        assert max(got) <= at + k * size + 1, f"{call}: {max(got)} is farther than slot 0"
        assert list(got) == want, f"{call} should be {want}, not {list(got)}"


@exercise("08-fits")
def _(fits):
    for length, size, top_k in [
        (8, 16, 1),
        (8, 16, 2),
        (8, 51, 1),
        (1, 4, 1),
        (20, 4, 7),
        (20, 4, 6),
        (15, 16, 1),
    ]:
        places = range(size - 1)  # of the first token inside its block, by what insert_landmarks does
        blocks = [{(p + i) // (size - 1) for i in range(length)} for p in places]
        want = sum(len(b) <= top_k for b in blocks) / len(places)
        got = fits(length, size, top_k)
        assert abs(float(got) - want) < 1e-9, (
            f"fits({length}, {size}, {top_k}) should be {want:.4f}, not {got:.4f}: a block holds {size - 1} tokens of the text"
        )


@exercise("08-shared-choice")
def _(shared_choice):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(6, 12, generator=generator)
    scores[0] += 20  # a query that likes everything must not choose for all
    for top_k in (1, 3, 12):
        want = choose_blocks(scores[None, None], torch.ones(1, 12, dtype=torch.bool), top_k, "head").flatten()
        got = torch.as_tensor(shared_choice(scores.clone(), top_k)).flatten()
        assert len(got) == top_k, f"top_k={top_k}: return {top_k} blocks for all queries, not {len(got)}"
        assert torch.equal(got, got.sort().values), "return the blocks in ascending order"
        raw = scores.amax(0).topk(top_k).indices.sort().values
        assert torch.equal(got, want) or not torch.equal(got, raw), (
            "you compare raw scores: take each query's softmax over the landmarks first"
        )
        assert torch.equal(got, want), f"top_k={top_k}: should be {want.tolist()}, not {got.tolist()}"
