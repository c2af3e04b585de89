"""Perplexity by position: how well a model predicts each token of a long text, and where that breaks.

Three ways to read the same tokens: one forward over everything (`nll_by_position`), and the control, fresh windows
that never leave the trained range (`nll_sliding`, the protocol of Press et al. 2022, Train Short Test Long, appendix B).
Only their difference on the *same tokens* says something about position: a raw curve of one document mostly shows
where its text is hard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Bin:
    """Tokens `start` <= position < `start + width`: `mean` and `std` of their NLL in nats, and their `count`.

    The position is the one the model reads at when it predicts the token, so it runs from 0 to T-2. `std` is the
    sample standard deviation (NaN for a single token).
    """

    start: int
    mean: float
    count: int
    std: float

    @property
    def perplexity(self) -> float:
        """exp(mean): the size of the uniform choice the model is as unsure as."""
        return math.exp(self.mean)


@torch.inference_mode()
def nll_by_position(
    model,
    input_ids: torch.Tensor,
    *,
    chunk: int = 1024,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each next token, from one forward with full attention over the whole text.

    The head is applied to `chunk` hidden states at a time, so that logits [T, vocabulary] never exist at once:
    16,384 positions of a 49,152-word vocabulary would be 3.2 GB in float32.

    Args:
        model: a Hugging Face causal language model in eval mode.
        input_ids: [T] or [1, T] token ids, T >= 2.
        chunk: positions whose logits are in memory together.
        position_ids: [1, T], passed through; default 0..T-1.
        attention_mask: passed through, in any form the model takes; default causal.

    Returns:
        [T-1] float32 on the CPU, in nats: entry i is -log p(token i+1 | tokens 0..i).

    Raises:
        ValueError: for another shape, T < 2 or chunk < 1.
        UnsupportedModelError: if the model has no body and output head to be called apart.
    """
    ids = _one_row(input_ids).to(model.device)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    extra = {"position_ids": position_ids, "attention_mask": attention_mask}
    extra = {k: v.to(model.device) for k, v in extra.items() if v is not None}
    body, head = _body_and_head(model)
    hidden = body(input_ids=ids, use_cache=False, **extra).last_hidden_state[0, :-1]
    target = ids[0, 1:]
    parts = [
        F.cross_entropy(head(hidden[i : i + chunk]).float(), target[i : i + chunk], reduction="none")
        for i in range(0, len(target), chunk)
    ]
    return torch.cat(parts).cpu()


@torch.inference_mode()
def nll_sliding(
    model, input_ids: torch.Tensor, window: int, stride: int | None = None, *, batch: int = 8
) -> torch.Tensor:
    """The control: NLL of the same tokens when every forward starts again at position 0 and is `window` long.

    The window moves on by `stride` and only the tokens not scored before count, so each token past the first window
    is predicted from at least `window - stride` tokens of context and no position is ever larger than `window - 1`.

    Args:
        model: a Hugging Face causal language model in eval mode.
        input_ids: [T] or [1, T] token ids, T >= 2.
        window: tokens a forward sees. stride: 1 <= stride < window, default half the window.
        batch: windows in one forward.

    Returns:
        [T-1] float32 on the CPU, in nats, aligned with `nll_by_position`.

    Raises:
        ValueError: for another shape, or a stride outside 1..window-1.
    """
    ids = _one_row(input_ids).to(model.device)[0]
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride must be between 1 and window-1 = {window - 1}, got {stride}")
    length = len(ids)
    window = min(window, length)
    # The last window is moved back to end with the text, so that all windows have the same shape.
    starts = [*range(0, length - window, stride), length - window]
    nll = torch.full((length - 1,), float("nan"))
    body, head = _body_and_head(model)
    done = 0  # entries of `nll` scored so far
    for at in range(0, len(starts), batch):
        group = starts[at : at + batch]
        rows = torch.stack([ids[s : s + window] for s in group])
        hidden = body(input_ids=rows, use_cache=False).last_hidden_state
        for s, h, row in zip(group, hidden, rows, strict=True):
            new = slice(done - s, window - 1)
            nll[done : s + window - 1] = F.cross_entropy(
                head(h[new]).float(), row[1:][new], reduction="none"
            ).cpu()
            done = s + window - 1
    return nll


def perplexity(model, input_ids: torch.Tensor, **how) -> float:
    """exp of the mean NLL over one text; arguments as for `nll_by_position`."""
    return math.exp(nll_by_position(model, input_ids, **how).mean().item())


def bin_by_position(nll: torch.Tensor, width: int) -> list[Bin]:
    """Cut an NLL curve [T-1] into bins of `width` positions. The last bin may hold fewer; its `count` says so.

    Raises ValueError for an empty or many-dimensional curve, or width < 1.
    """
    if nll.ndim != 1 or len(nll) == 0 or width < 1:
        raise ValueError(
            f"bin_by_position needs a curve [T-1] and width >= 1, got {tuple(nll.shape)} and {width}"
        )
    bins = []
    for start in range(0, len(nll), width):
        part = nll[start : start + width].double()
        std = part.std().item() if len(part) > 1 else float("nan")
        bins.append(Bin(start, part.mean().item(), len(part), std))
    return bins


def perplexity_by_position(
    nll: torch.Tensor, width: int, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Perplexity over several texts in bins of `width` positions, with a bootstrap interval over the texts.

    Args:
        nll: [texts, T-1] in nats.
        width: positions a bin; a last, shorter bin is kept.
        level: of the percentile interval. resamples, seed: of the bootstrap.

    Returns:
        perplexity, low, high: [bins] float64. With one text all three are equal: there is no interval to give.

    Raises:
        ValueError: for a curve that is not [texts, T-1], or width < 1.
    """
    if nll.ndim != 2 or nll.numel() == 0 or width < 1:
        raise ValueError(f"need curves [texts, T-1] and width >= 1, got {tuple(nll.shape)} and {width}")
    bins = torch.stack([part.mean(1) for part in nll.double().split(width, 1)], 1)  # [texts, bins]
    drawn = torch.randint(len(bins), (resamples, len(bins)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - level) / 2
    low, high = torch.quantile(bins[drawn].mean(1), torch.tensor([tail, 1 - tail], dtype=bins.dtype), dim=0)
    return bins.mean(0).exp(), low.exp(), high.exp()


def ratio_by_position(
    plain: torch.Tensor, control: torch.Tensor, width: int, **how
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Perplexity of `plain` over that of `control` on the same tokens; arguments as for `perplexity_by_position`.

    The two are compared text by text, so how hard a text is cancels, in the ratio and in its interval.
    Raises ValueError if the shapes differ.
    """
    if plain.shape != control.shape:
        raise ValueError(
            f"need two curves of the same tokens, got {tuple(plain.shape)} and {tuple(control.shape)}"
        )
    return perplexity_by_position(plain.double() - control.double(), width, **how)


def crossing(ratio: torch.Tensor, width: int, factor: float = 2.0) -> float | None:
    """Position at which the ratio of `ratio_by_position` first reaches `factor`, or None if it never does.

    Each bin stands at its middle; between two middles the logarithm of the ratio is interpolated.
    """
    above = (ratio >= factor).nonzero().flatten()
    if len(above) == 0:
        return None
    i = above[0].item()
    if i == 0:
        return width / 2
    a, b, c = math.log(ratio[i - 1]), math.log(ratio[i]), math.log(factor)
    return (i - 0.5 + (c - a) / (b - a)) * width


def _one_row(input_ids: torch.Tensor) -> torch.Tensor:
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"perplexity needs one text [T] or [1, T] with T >= 2, got shape {tuple(ids.shape)}")
    return ids


def _body_and_head(model):
    body, head = getattr(model, "base_model", None), model.get_output_embeddings()
    if head is None or body is None or body is model:
        name = type(model).__name__
        raise UnsupportedModelError(
            f"{name} has no separate body and output head: load it with AutoModelForCausalLM"
        )
    return body, head
