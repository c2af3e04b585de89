"""The matrix of the contract tests: every method over small random models of every supported family.

A method joins the matrix by one entry in METHODS. A test that takes the fixtures `method` and `model` then runs for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lcx import FocusedAttention, LandmarkAttention, SelfExtend

# family: (its configuration class, options, ties the head to the embedding, seed)
FAMILIES = {
    "llama": (LlamaConfig, {}, False, 0),
    "mistral": (MistralConfig, {"sliding_window": None}, True, 1),
    "qwen2": (Qwen2Config, {}, True, 2),  # biases on q, k, v
    "qwen3": (Qwen3Config, {}, False, 3),  # RMSNorm on each head of q and k
}
VOCAB, LENGTH = 97, 24
LANDMARK = VOCAB - 1  # in no input, and under Landmark Attention never predicted


@dataclass(frozen=True)
class Method:
    """One row of the matrix. attach(model) is a context manager inside which the model works by the method.

    equals_plain: with the inputs of these tests the method has nothing to do, so the model gives its plain logits.
    pieces: ways to cut an input that must not matter. regroups: a longer input is cut into other windows, so that
    decoding and a fresh run of all tokens are different by definition.
    """

    name: str
    attach: Callable[[PreTrainedModel], AbstractContextManager]
    equals_plain: bool = True
    pieces: tuple[tuple[int, ...], ...] = ((10, 1, 13), (1,) * LENGTH)
    regroups: bool = False


METHODS = {
    m.name: m
    for m in [
        Method("vanilla", lambda model: nullcontext()),
        Method("focused", lambda model: FocusedAttention(memory_layers=(0, 1))(model)),
        Method(
            "focused-windows",  # three windows of 8 tokens, all but the last in memory
            lambda model: FocusedAttention(memory_layers=(1,), window=8)(model),
            equals_plain=False,
            pieces=((8, 8, 8), (16, 8), (1,) * LENGTH),
            regroups=True,
        ),
        # Blocks longer than the input: no landmark is reached.
        Method("landmark", lambda model: LandmarkAttention(32, landmark_id=LANDMARK)(model)),
        Method(
            "landmark-dense",  # three tokens and a landmark to a block, all blocks in sight
            lambda model: LandmarkAttention(4, top_k=None, landmark_id=LANDMARK)(model),
            equals_plain=False,
        ),
        Method(
            "landmark-blocks",  # chunks of six tokens, two of up to six earlier blocks fetched
            lambda model: LandmarkAttention(4, top_k=2, window=8, landmark_id=LANDMARK)(model),
            equals_plain=False,
            pieces=((6, 6, 6, 6), (12, 12), (6, 18)),
            regroups=True,
        ),
        # Neighbours only: no position is shared.
        Method("selfextend", lambda model: SelfExtend(4, LENGTH + 8)(model)),
        Method(
            "selfextend-groups",  # groups that do not divide the neighbour window
            lambda model: SelfExtend(3, 8)(model),
            equals_plain=False,
        ),
    ]
}


def tiny_config(family: str, **changes) -> PretrainedConfig:
    """Two layers, four query heads on two key-value heads (GQA), and a head size of 100, no power of two."""
    make, options, tie, _ = FAMILIES[family]
    size = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 100, "rope_theta": 1000.0}
    rest = {
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return make(**{**size, **heads, **rest, "eos_token_id": None, **options, **changes})


def tiny_model(family: str, **changes) -> PreTrainedModel:
    """A random model in eval mode. Every parameter is drawn anew and large: at the usual 0.02 the attention would
    hardly move a logit, biases would be zero and norms one, so that a wrong attention went unseen."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    g = torch.Generator().manual_seed(FAMILIES[family][3])
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def tokens(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """int64 [rows, length] without the padding token 0 and the landmark."""
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids.clamp(max=LANDMARK - 1)


def of_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The logits of what inputs consist of: a landmark's may be -inf."""
    return logits[..., :LANDMARK]


def logits(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs
) -> torch.Tensor:
    """Logits [B, T, V]; with a padding mask, positions count from each row's first real token, as in generate."""
    if mask is not None:
        kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), **kwargs}
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return METHODS[request.param]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(family) -> PreTrainedModel:
    """Shared by all tests: attach and read, but change nothing."""
    return tiny_model(family)
