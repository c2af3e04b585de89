"""Landmark tokens: one after every block_size - 1 tokens of a text (Mohtashami & Jaggi 2023, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import causal_lm
from .errors import LcxError

LANDMARK = "<landmark>"


def insert_landmarks(ids: Tensor, block_size: int, landmark_id: int, start: int = 0) -> Tensor:
    """ids [..., N] of a text -> [..., N + N // (block_size - 1)], with a landmark after every block_size - 1 tokens.

    A last block that is not full gets none. start: how many tokens of the text came before these ids, so that a text
    inserted piece by piece equals the text inserted whole. Raises LcxError if block_size is below 2 or an id is the
    landmark already.
    """
    _check(block_size, start)
    if (ids == landmark_id).any():
        raise LcxError(
            f"the ids hold the landmark {landmark_id} already: give the text alone, or remove_landmarks first"
        )
    return _widen(ids, block_size, landmark_id, start)


def remove_landmarks(ids: Tensor, block_size: int) -> Tensor:
    """The inverse of insert_landmarks: [..., T] -> [..., T - T // block_size], from the start of a text."""
    _check(block_size)
    return ids[..., torch.arange(ids.shape[-1], device=ids.device) % block_size != block_size - 1]


def landmark_labels(
    labels: Tensor, block_size: int, loss_at_landmarks: bool = False, landmark_id: int | None = None
) -> Tensor:
    """What each position of a text with landmarks must predict, already shifted: for `shift_labels` of transformers.

    labels [..., N] of the text without landmarks, not shifted (the label of a token is itself), -100 where there is no
    loss. Returns [..., N + N // (block_size - 1)].

    By default nothing predicts a landmark: the last token of a block predicts the first of the next block, and landmarks predict
    nothing. With loss_at_landmarks, the convention of the released LLaMA weights, the last token of a block predicts
    the landmark (if that token has a label) and the landmark the first token of the next block.

    Raises LcxError if block_size is below 2, or if loss_at_landmarks comes without landmark_id.
    """
    _check(block_size)
    if not loss_at_landmarks:
        return _widen(_shifted(labels), block_size, -100)
    if landmark_id is None:
        raise LcxError("loss_at_landmarks needs landmark_id, the label of a landmark")
    widened = _widen(labels, block_size, landmark_id)
    landmark = _is_landmark(widened.shape[-1], block_size, 0, labels.device)
    return _shifted(widened.masked_fill(landmark & (widened.roll(1, -1) == -100), -100))


def add_landmark(model, tokenizer, token: str = LANDMARK, pad: bool = False) -> int:
    """Give tokenizer and model a landmark token and return its id, which config.mem_id then holds.

    The new rows of the input and output embeddings are the mean of the old ones. Called again, it changes nothing; a tokenizer
    that has the token keeps its id, and a row the model has for it stays as it is. pad: first add "[PAD]" as
    padding token if the tokenizer has none, as the released weights have it.

    Raises LcxError if `token` is a plain word of the vocabulary, if the tokenizer has more tokens than the model has rows, or if
    config.mem_id names another token. UnsupportedModelError for another family.
    """
    from tokenizers import AddedToken

    inner = causal_lm(model)
    known, rows = tokenizer.get_vocab(), inner.get_input_embeddings().weight.shape[0]
    if token in known and known[token] not in tokenizer.added_tokens_decoder:
        raise LcxError(f"{token!r} is a word of this tokenizer: choose another landmark token")
    before = getattr(inner.config, "mem_id", None)
    if before is not None and before != known.get(token):
        raise LcxError(
            f"the model's landmark is token {before} and this tokenizer has no {token!r} there: use the tokenizer "
            "that was saved with the model"
        )
    words = max(i for t, i in known.items() if t not in (token, "[PAD]"))
    if words >= rows:
        raise LcxError(
            f"the tokenizer has ids up to {words} and the model {rows} rows: they do not belong together"
        )
    if pad and tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    new = sorted(i for t, i in tokenizer.get_vocab().items() if t not in known or i >= rows)
    if new and new[-1] >= rows:
        with torch.random.fork_rng():  # the rows it draws are overwritten below
            inner.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    weights = {
        inner.get_input_embeddings().weight,
        inner.get_output_embeddings().weight,
    }  # one if they are tied
    with torch.no_grad():
        for w in weights:
            # Rows past those of the tokenizer were never trained: they are padding, and no part of the mean.
            w[new] = w[: words + 1].float().mean(0).to(w.dtype)
    landmark = tokenizer.convert_tokens_to_ids(token)
    inner.config.mem_id = landmark
    return landmark


def encode(tokenizer, text: str, landmark_id: int) -> list[int]:
    """Token ids of a text without bos and eos. A landmark that somebody has typed is tokenised as the letters it is made of.

    Raises LcxError if the tokenizer cannot do that.
    """
    plain = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(text, **plain).input_ids
    if landmark_id in ids:  # then no special token of this text is special
        ids = tokenizer(text, **plain, split_special_tokens=True).input_ids
    if landmark_id in ids:
        raise LcxError(
            "the text holds the landmark token, and this tokenizer always makes it one: take it out"
        )
    return ids


def _check(block_size: int, start: int = 0) -> None:
    if block_size < 2:
        raise LcxError(
            f"block_size {block_size} holds no token beside its landmark: use 2 or more, 64 is common"
        )
    if start < 0:
        raise LcxError(f"start {start}: give how many tokens came before, 0 or more")


def _is_landmark(length: int, block_size: int, first: int, device) -> Tensor:
    return torch.arange(first, first + length, device=device) % block_size == block_size - 1


def _widen(x: Tensor, block_size: int, value: int, start: int = 0) -> Tensor:
    """x with `value` where landmarks stand."""
    text = block_size - 1
    first = start + start // text  # the place of x[..., 0] in the sequence with landmarks
    length = x.shape[-1] + (start + x.shape[-1]) // text - start // text
    out = x.new_full((*x.shape[:-1], length), value)
    out[..., ~_is_landmark(length, block_size, first, x.device)] = x
    return out


def _shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
