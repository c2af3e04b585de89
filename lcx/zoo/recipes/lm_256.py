"""lm-256: a language model that has never seen more than 256 tokens at once. Made to be taken past that edge."""

from __future__ import annotations

import math

import torch

from ...corpora import text
from . import Recipe

WINDOW = 256
VOCAB_SIZE = 1024
SEPARATOR = "<|endoftext|>"


def tokenizer():
    """Byte-level BPE with 1,024 entries, trained on the train split. The same text always gives the same merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in text("sotu", "train")), trainer)
    # Texts longer than the window are the point of this model, so no maximum length: it would only bring warnings.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    )


def stream(tok, split: str) -> torch.Tensor:
    """All documents of a split as one row of tokens, int64 [n], a separator before each document."""
    backend = tok.backend_tokenizer
    ids: list[int] = []
    for encoding in backend.encode_batch([d.text for d in text("sotu", split)]):
        ids.append(tok.bos_token_id)
        ids += encoding.ids
    return torch.tensor(ids)


class Windows(torch.utils.data.Dataset):
    """`examples` windows of 256 tokens at starts drawn from a seeded generator, so that example i is always the same."""

    def __init__(self, tokens: torch.Tensor, examples: int, seed: int):
        self.tokens = tokens
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, len(tokens) - WINDOW + 1, (examples,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        window = self.tokens[self.starts[i] : self.starts[i] + WINDOW]
        return {"input_ids": window, "labels": window}


def data(tok, seed: int, examples: int):
    return Windows(stream(tok, "train"), examples, seed), Windows(stream(tok, "heldout"), 64, seed=1)


def bigram_baseline(vocab_size: int, train: torch.Tensor, heldout: torch.Tensor) -> tuple[float, float]:
    """Held-out loss (nats per token) of counted unigrams, and of bigrams mixed with them. Tokens are int64 [n]."""
    unigram = torch.bincount(train, minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).double()
    pairs = pairs.view(vocab_size, vocab_size)
    # Each row gets 10 pseudo-counts spread as the unigrams are, so that unseen pairs keep some probability.
    bigram = (pairs + 10 * unigram) / (pairs.sum(1, keepdim=True) + 10)
    before, after = heldout[:-1], heldout[1:]
    return -unigram[after].log().mean().item(), -bigram[before, after].log().mean().item()


def baselines(tok) -> dict[str, float]:
    """Held-out losses in nats per token of two models that only count, for the card."""
    unigram, bigram = bigram_baseline(len(tok), stream(tok, "train"), stream(tok, "heldout"))
    return {"unigram_loss": unigram, "bigram_loss": bigram}


@torch.no_grad()
def nll_by_position(model, windows: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the tokens at positions 1 … T-1 of `windows` [n, T]. Float64 [T-1]."""
    total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
    for part in windows.split(batch):
        part = part.to(model.device)
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        total += loss.view(len(part), -1).sum(0).double().cpu()
    return total / len(windows)


def score(model, tok) -> dict[str, float]:
    """Held-out losses in nats per token, inside the window and past it.

    The same 64 stretches of 1,024 tokens serve for both, evenly spaced over the held-out documents.
    """
    heldout = stream(tok, "heldout")
    starts = torch.linspace(0, len(heldout) - 4 * WINDOW, 64).long()
    stretches = heldout[starts[:, None] + torch.arange(4 * WINDOW)]
    inside = nll_by_position(model, stretches.view(-1, WINDOW)).mean().item()
    past = nll_by_position(model, stretches)
    return {
        "loss": inside,
        "perplexity": math.exp(inside),
        "loss_at_256_to_511": past[WINDOW - 1 : 2 * WINDOW - 1].mean().item(),
        "loss_at_512_to_1023": past[2 * WINDOW - 1 :].mean().item(),
    }


RECIPE = Recipe(
    name="lm-256",
    about="LLaMA with a 256-token window, for what happens past the edge of a window",
    data_about="sotu 0.1.2, train split (245 documents), byte-level BPE with 1,024 entries",
    config={
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    },
    steps=2400,
    batch_size=16,
    training={
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
    },
    tokenizer=tokenizer,
    data=data,
    score=score,
    baselines=baselines,
)
