"""Chapter 6 on a GPU: SmolLM2 trained by crossbatch on real text, and LongLLaMA's shapes at 262,144 tokens.

Both are written for one large GPU and refuse to start without one; the functions behind them run at any size.
"""

from __future__ import annotations

import resource
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import LcxError
from . import kept, measurement

LENGTH = 262144
# Field names of LlamaConfig, from the released configs; weights are random, so only time and size mean anything.
SHAPES = {
    "3B": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32016},
}
MEMORY_LAYERS = {"3B": (6, 12, 18), "7B": (8, 16, 24)}
WINDOW = {"3B": 2048, "7B": 4096}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SAMPLES = 4  # passkeys at each of five depths
LAST = 256  # tokens whose loss is taken, at the end of each length


def need_gpu(what: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise LcxError(f"{what} needs a CUDA GPU: run it on one, the committed result is missing until then")


def prefill(
    config: dict[str, Any], memory_layers, length: int, device: str, dtype, tier="device"
) -> dict[str, Any]:
    """Read `length` random tokens into the memory of a random LLaMA: seconds, peak bytes, bytes of the memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..focused import FocusedAttention

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        finally:
            torch.set_default_dtype(before)
    ids = torch.randint(config["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with FocusedAttention(memory_layers, tier=tier)(model), torch.no_grad():
        start = time.perf_counter()
        out = model(ids, logits_to_keep=1)
        first = float(out.logits.float().abs().max())  # waits for the device
        filled = time.perf_counter() - start
        cache, token = out.past_key_values, out.logits.argmax(-1)
        start = time.perf_counter()
        for _ in range(8):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        token.item()
        per_token = (time.perf_counter() - start) / 8
    if first != first:
        raise LcxError("the model gave NaN: use bfloat16 or float32")
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "length": length,
        "prefill_seconds": round(filled, 3),
        "seconds_per_token": round(per_token, 4),
        "peak_bytes": peak,
        "memory_bytes": cache.memory.nbytes,
        "bytes_per_token": cache.memory.bytes_per_token,
    }


@measurement("focused-shapes", model=None, seed=0)
def focused_shapes() -> dict[str, Any]:
    """Time and memory of LongLLaMA's 3B and 7B shapes with 262,144 tokens (random weights; needs a GPU)."""
    import torch

    need_gpu("focused-shapes")
    rows = []
    for name, shape in SHAPES.items():
        config = {**shape, "num_attention_heads": 32, "max_position_embeddings": WINDOW[name]}
        for tier in ("device", "host"):
            figures = prefill(config, MEMORY_LAYERS[name], LENGTH, "cuda", torch.bfloat16, tier)
            rows.append({"shape": name, "tier": tier, **figures})
            torch.cuda.empty_cache()
    return {"rows": rows}


def by_length(
    ways: dict, tokenizer, texts, *, samples: int = SAMPLES, last: int = LAST, partial=None
) -> list[dict[str, Any]]:
    """Passkeys and loss by length for several ways to run a model.

    ways: name -> (model, what makes the context manager to run it in, lengths in tokens). texts: token lists; the loss of the last
    `last` tokens of each length is taken on all that are long enough. partial: name -> file that keeps finished passkeys. Rows of
    model, length, passkeys, of, loss (None if no text is long enough), texts.
    """
    import torch

    from ..evaluate import grid, table
    from ..tasks import passkey

    rows = []
    for name, (model, attached, lengths) in ways.items():
        keep = {"partial": partial(name)} if partial else {}
        with attached():
            for length in lengths:
                depths = (0, 0.25, 0.5, 0.75, 1)
                found = grid(
                    model, tokenizer, passkey.sample, lengths=[length], depths=depths, n=samples, **keep
                )
                losses = []
                for ids in (t[:length] for t in texts if len(t) >= length):
                    row = torch.tensor([ids], device=model.device)
                    with torch.inference_mode():
                        logits = model(row, logits_to_keep=last + 1, use_cache=False).logits[0, :-1].float()
                    losses.append(torch.nn.functional.cross_entropy(logits, row[0, -last:]).item())
                score = table(found, "length")[0]
                rows.append(
                    {"model": name, "length": length, "passkeys": score["hits"], "of": score["n"]}
                    | {"loss": sum(losses) / len(losses) if losses else None, "texts": len(losses)}
                )
    return rows


def compare(
    plain, tuned, tokenizer, texts, lengths, *, samples: int = SAMPLES, last: int = LAST
) -> list[dict[str, Any]]:
    """`by_length` for a model as it is, with an untrained memory, and trained for one, which its config says."""
    from ..focused import FocusedAttention

    settings = FocusedAttention.of(tuned)
    ways = {
        "plain": (plain, nullcontext, lengths),
        "memory, not trained for it": (plain, lambda: settings(plain), lengths),
        "trained by crossbatch": (tuned, lambda: settings(tuned), lengths),
    }
    return by_length(ways, tokenizer, texts, samples=samples, last=last)


@measurement("smollm2-focused", model=None, seed=0)
def smollm2_focused() -> dict[str, Any]:
    """SmolLM2-135M trained by crossbatch on State of the Union addresses: passkeys and loss by length (needs a GPU)."""
    from ..corpora import text
    from ..finetune import finetune
    from ..finetune_focused import FocusedSettings
    from ..models import load

    need_gpu("smollm2-focused")
    out = Path(kept("smollm2-focused")).with_suffix("")
    settings = FocusedSettings(
        "smollm2-135m", ("sotu",), window=1024, steps=1000, batch_size=8, schedule="sampled", range="3,7,15"
    )
    card = finetune(settings, out, command="lcx measure smollm2-focused")
    plain, tokenizer = load("smollm2-135m", device="cuda")
    tuned, _ = load(out, device="cuda")
    texts = [tokenizer(d.text, add_special_tokens=False).input_ids for d in text("sotu", "heldout")]
    return {"training": card, "last": LAST, "rows": compare(plain, tuned, tokenizer, texts, LENGTHS)}
