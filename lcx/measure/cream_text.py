"""Chapter 10 on real text: lm-256 carried to 2,048 tokens, perplexity by position."""

from __future__ import annotations

from typing import Any

from . import measurement
from .cream import rows_of_cells, samplers, train_under

WINDOW, FACTOR, WIDTH = 256, 8, 128
STEPS, BATCH, LEARNING_RATE = 200, 16, 3e-4
STRETCHES = 48  # of held-out text, 2,048 tokens each
SEEDS = (0, 1)


def rows_of(tokens, length: int, examples: int, seed: int):
    """A dataset of `examples` stretches of `length` tokens (int64 [n]) at starts drawn from the seed."""
    import torch

    class Stretches(torch.utils.data.Dataset):
        starts = torch.randint(
            len(tokens) - length + 1, (examples,), generator=torch.Generator().manual_seed(10**7 + seed)
        ).tolist()

        def __len__(self):
            return examples

        def __getitem__(self, i):
            ids = tokens[self.starts[i] : self.starts[i] + length]
            return {"input_ids": ids, "labels": ids, "index": i}

    return Stretches()


def bins(nll, width: int = WIDTH) -> list[float]:
    """Mean of nll [T-1], in nats, over each `width` positions: the first bin lacks the first token, which has no prediction."""
    from ..tasks.perplexity import bin_by_position

    return [round(b.mean, 4) for b in bin_by_position(nll, width)]


def one(
    model, tokens, stretches, arm: str, scaling: str, seed: int, factor: int = FACTOR, steps: int = STEPS
) -> list[float]:
    """NLL by position of held-out `stretches` (int64 [n, T]), after the training that `arm` stands for; "zero-shot" has none, "fresh"
    reads each stretch in windows of the trained length that overlap by half."""
    from contextlib import nullcontext

    import torch

    from ..methods.scaling import scale_rope
    from ..selfextend import SelfExtend
    from ..tasks.perplexity import nll_sliding
    from ..zoo.recipes.lm_256 import nll_by_position

    window = model.config.max_position_embeddings
    if arm == "fresh":
        nll = torch.stack([nll_sliding(model, s, window, window // 2) for s in stretches])
        return bins(nll.double().mean(0))
    context = nullcontext()
    if scaling == "selfextend":  # 96 + (2,048 - 96) / 16 = 218 of the 256 distances
        context = SelfExtend(group_size=2 * factor, neighbor_window=window * 3 // 8)(model)
    elif scaling != "none":
        scale_rope(model, scaling, factor)
    if arm != "zero-shot":
        length, batch = (window * factor, BATCH // factor) if arm == "full" else (window, BATCH)
        rows = rows_of(tokens, length, steps * batch, seed)
        how = {"steps": steps, "batch": batch, "learning_rate": LEARNING_RATE, "seed": seed}
        train_under(model, rows, samplers(factor, window, k=None)[arm], **how)
    with context:
        return bins(nll_by_position(model, stretches, batch=4))


def cells() -> list[tuple[str, str, int]]:
    rows = [("fresh", "none", 0)]
    rows += [("zero-shot", s, 0) for s in ("none", "linear", "ntk", "yarn", "selfextend")]
    rows += [(arm, "yarn", 0) for arm in ("ordinary", "randpos", "pose", "cream", "cream-uniform", "full")]
    rows += [(arm, "linear", 0) for arm in ("pose", "cream")]
    return rows + [(arm, "yarn", s) for s in SEEDS[1:] for arm in ("pose", "cream")]


@measurement("cream-text", model=None, seed=0)
def cream_text() -> dict[str, Any]:
    """Perplexity by position of lm-256 carried to 8 times its window on held-out text: labels, scalings, SelfExtend."""
    import torch

    from .. import zoo
    from ..zoo.recipes.lm_256 import stream

    tokenizer = zoo.load("lm-256", device="cpu")[1]
    tokens, heldout = stream(tokenizer, "train"), stream(tokenizer, "heldout")
    length = WINDOW * FACTOR
    starts = torch.linspace(0, len(heldout) - length, STRETCHES).long()
    stretches = heldout[starts[:, None] + torch.arange(length)]

    def run(arm: str, scaling: str, seed: int):
        model = zoo.load("lm-256", device="cpu")[0]
        nll = one(model, tokens, stretches, arm, scaling, seed)
        return {"nll": nll}, f"{nll[0]:.3f} … {nll[-1]:.3f}"

    about = {
        "window": WINDOW,
        "factor": FACTOR,
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "width": WIDTH,
        "stretches": STRETCHES,
    }
    return about | {"rows": rows_of_cells("cream-text", cells(), run)}
