"""Topic documents: the smallest task on which the distraction issue shows.

A document has its own distribution over the tokens and is nothing but independent draws from it. Whoever has seen
more of the document predicts the rest better; whoever mixes it up with others predicts worse than with no memory.
"""

from __future__ import annotations

import torch

from ..errors import LcxError

VOCAB_SIZE = 48
SHARPNESS = (
    2.5  # standard deviation of the logits: a document's ten commonest tokens make up about 90 % of it
)


def topic_documents(documents: int, length: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """int64 [documents, length]; each row drawn from its own softmax(2.5 * normal) over 48 tokens.

    generator: a torch.Generator on the CPU; None takes a new one with seed 0. No global state is read or changed.
    Raises LcxError unless documents and length are at least 1.
    """
    if documents < 1 or length < 1:
        raise LcxError(f"{documents} documents of {length} tokens are not possible: use 1 or more of both")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    topics = (SHARPNESS * torch.randn(documents, VOCAB_SIZE, generator=generator)).softmax(-1)
    return torch.multinomial(topics, length, replacement=True, generator=generator)
