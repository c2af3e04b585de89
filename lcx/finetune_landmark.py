"""`lcx train landmark`: the model learns to find blocks of its past through landmarks (Mohtashami & Jaggi 2023, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import LcxError
from .finetune import Method, Settings


@dataclass(frozen=True)
class LandmarkSettings(Settings):
    """All that decides what comes out: the options of `lcx train landmark`, which says what each is.

    A row has train_length tokens, of which train_length // block_size are landmarks. No landmark is predicted.
    """

    block_size: int = 64
    train_length: int | None = None

    def check(self) -> None:
        super().check()
        size, length = self.block_size, self.train_length
        if size < 2:
            raise LcxError(
                f"block_size {size} holds no token beside its landmark: use 2 or more, 64 is common"
            )
        if length is not None and (length < size or length % size):
            raise LcxError(
                f"train_length {length} is no multiple of block_size {size}: use {max(length // size, 1) * size}"
            )

    def method(self, model, tokenizer, texts: Sequence[str]) -> Method:
        from .landmark import LandmarkAttention
        from .landmark_tokens import add_landmark, encode
        from .train import Documents

        size, longest = self.block_size, model.config.max_position_embeddings
        if (self.train_length or size) > longest:
            raise LcxError(
                f"{'train_length' if self.train_length else 'block_size'} {self.train_length or size} is more than "
                f"the model's window of {longest}: make it smaller"
            )
        length = self.train_length or min(longest, max(2048, size)) // size * size
        landmark = add_landmark(model, tokenizer)
        ids = (encode(tokenizer, text, landmark) for text in texts)
        marks = tokenizer.bos_token_id, tokenizer.eos_token_id
        return Method(
            about=f"trained with a landmark in every block of {size} tokens, rows of {length}",
            attention=LandmarkAttention(size, None, train_length=length, landmark_id=landmark),
            documents=lambda: Documents(ids, length // size * (size - 1), 1, *marks),
            item=f"rows of {length} tokens",
            fields={
                "mem_freq": size - 1,
                "mem_id": landmark,
                "train_context_length": length,
                "include_landmark_in_loss": False,
            },
            new_tokens=(landmark,),
        )
