"""Chapter 5: what of crossbatch training does the work, on the topic task.

Alike but for one thing each: gradients through the contexts or none, and how many negatives a model meets first. Every
training is one part; finished parts are kept in the cache, so an interrupted measurement goes on with the next.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import kept, measurement

SEED = 0
SEEDS = (0, 1)
STEPS = 500
IN_MEMORY = (1, 2, 8, 32)  # documents in the memory when a model is scored
PROBES = (0, 10, 25, 50, 75, 100, 150, 200, 300, 400, 500)  # steps at which r and loss are looked at
KEY_DOCUMENTS = 8  # of which keys are drawn
KEY_TOKENS = slice(8, 32)  # as in topic.measure: whoever has read 8 tokens knows something about the document
DIGITS = 4


@dataclass(frozen=True)
class Variant:
    """One way to train: d, optimiser steps and learning rate; from random weights or from topic-plain."""

    d: int
    steps: int
    learning_rate: float = 3e-3
    detached: bool = False
    retrofit: bool = False
    seeds: tuple[int, ...] = SEEDS


VARIANTS = {
    "differentiable": Variant(8, STEPS),
    "detached": Variant(8, STEPS, detached=True),
    # These three differ in d alone, and so do the two below them.
    "retrofit d=2": Variant(2, 300, retrofit=True, seeds=(0,)),
    "retrofit d=8": Variant(8, 300, retrofit=True, seeds=(0,)),
    "retrofit d=32": Variant(32, 300, retrofit=True, seeds=(0,)),
    "short retrofit d=2": Variant(2, 200, learning_rate=1e-3, retrofit=True, seeds=(0,)),
    "short retrofit d=8": Variant(8, 200, learning_rate=1e-3, retrofit=True, seeds=(0,)),
}


def detached_crossbatch(heads):
    """A method for lcx.attention.attach: crossbatch in a layer without positions, no gradient through the contexts.

    Contexts come with the call of the model, int64 [B, C]. Every entry gets a twin that carries no gradient, and the
    contexts name the twins, as the cached keys and values of a Memorizing Transformer would be.
    """
    import torch

    from ..methods.focused import crossbatch_attention

    contexts, entries = heads.extra["contexts"], len(heads.q)
    q, k, v = (torch.cat([x, x.detach()]) for x in (heads.q, heads.k, heads.v))
    twins = torch.where(contexts >= 0, contexts + entries, -1)
    table = torch.cat([twins, torch.full_like(contexts, -1)])
    return crossbatch_attention(q, k, v, table, scale=heads.scale)[:entries]


def keys_and_queries(model, documents: int, seed: int):
    """The memory layer's keys of the previous chunks and queries of the current ones, each [H, documents, S, D]."""
    import torch

    from ..zoo.recipes import topic

    attention, seen = model.model.layers[topic.MEMORY_LAYER].self_attn, {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        for name in ("k_proj", "q_proj")
    ]
    with torch.no_grad():
        model(topic.previous_then_current(documents, seed))  # neither depends on what this layer attends to
    for hook in hooks:
        hook.remove()
    shape = (2, documents, topic.CHUNK, -1, attention.head_dim)
    keys, queries = (seen[name].view(shape).permute(0, 3, 1, 2, 4) for name in ("k_proj", "q_proj"))
    return keys[0], queries[1]


def plane(snapshots: list[tuple[int, Any, Any]], head: int, document: int) -> list[dict[str, Any]]:
    """Keys of all documents and queries of one in the plane of the last keys' two main directions (PCA).

    snapshots: (step, keys, queries) as from keys_and_queries. The axes are the same at every step. Keys are taken
    from their mean of that step: one shift of all keys changes no share of attention among them. Queries are not
    centred, so that the product of a query and a key in the plane is the plane's part of their score. The document
    of the queries comes first.
    """
    import torch

    last = snapshots[-1][1][head][:, KEY_TOKENS].flatten(0, 1)
    axes = torch.linalg.svd(last - last.mean(0), full_matrices=False).Vh[:2]
    axes = axes * axes.sum(1).sign()[:, None]  # SVD leaves the sign open
    out = []
    for step, keys, queries in snapshots:
        k, q = keys[head][:, KEY_TOKENS], queries[head][document, KEY_TOKENS]
        k, q = (k - k.mean((0, 1))) @ axes.T, q @ axes.T
        k = torch.cat([k[document : document + 1], k[:document], k[document + 1 :]])
        out.append({"step": step, "keys": _rounded(k, 3), "queries": _rounded(q, 3)})
    return out


def _rounded(values, digits: int = DIGITS):
    """Nested lists of rounded numbers."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, dict):
        return {k: _rounded(v, digits) for k, v in values.items()}
    return [_rounded(v, digits) for v in values] if isinstance(values, list) else round(values, digits)


def _base(seed: int):
    """topic-plain of this seed: the zoo's own for seed 0 where it is there, else trained into the cache."""
    from transformers import AutoModelForCausalLM

    from .. import zoo

    folder = zoo.folder("topic-plain")
    if seed or not (folder / "card.json").is_file():
        folder = kept("crossbatch-ablations").parent / f"topic-plain-seed{seed}"
        if not (folder / "card.json").is_file():
            zoo.train("topic-plain", out=folder, seed=seed)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def _train(variant: Variant, seed: int, probe) -> Any:
    """Train one model; probe(model, step, loss of the last steps) is called at PROBES and at the end."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from .. import zoo
    from ..attention import attach
    from ..focused import FocusedAttention
    from ..train import constant, lanes
    from ..zoo.recipes import topic
    from ..zoo.training import kept_random_state, make_trainer

    recipe = zoo.recipe("topic-d8")
    recipe = replace(
        recipe,
        contexts=lanes(constant(variant.d)),
        training={**recipe.training, "learning_rate": variant.learning_rate},
        save_steps=10**9,
    )

    class Probe(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            probe(model, 0)

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step in PROBES or state.global_step == variant.steps:
                probe(model, state.global_step)

    with kept_random_state(), tempfile.TemporaryDirectory() as work:
        torch.manual_seed(seed)
        model = _base(seed) if variant.retrofit else LlamaForCausalLM(LlamaConfig(**recipe.config))
        data_seed = seed + 1000 if variant.retrofit else seed  # a retrofit goes on with data it has not seen
        job = make_trainer(recipe, model, recipe.tokenizer(), Path(work), data_seed, variant.steps)
        job.add_callback(Probe())
        if variant.detached:
            context = attach(model, {topic.MEMORY_LAYER: detached_crossbatch})
        else:
            context = FocusedAttention.of(model)(model)
        with context:
            job.train()
    losses = [[log["step"], round(log["loss"], DIGITS)] for log in job.state.log_history if "loss" in log]
    return model.eval(), losses


def part(variant: Variant, seed: int, with_keys: bool) -> dict[str, Any]:
    """Train and score one model: figures, curve of held-out r and loss at 8, training loss, and its keys if wanted."""
    from transformers import LlamaForCausalLM

    from ..zoo.recipes import topic

    curve, snapshots, twin = [], [], None

    def probe(model, step: int) -> None:
        nonlocal twin  # scoring opens its own FocusedAttention, so it needs a model that is not inside one
        twin = twin or LlamaForCausalLM(model.config).eval()
        twin.load_state_dict(model.state_dict())
        at = topic.measure(twin, 8)
        curve.append({"step": step, "r": round(at["r"], DIGITS), "loss": round(at["loss"], DIGITS)})
        if with_keys:
            snapshots.append((step, *keys_and_queries(twin, KEY_DOCUMENTS, topic.HELDOUT_SEED)))

    model, losses = _train(variant, seed, probe)
    scores = {str(d): topic.measure(model, d) for d in (0, *IN_MEMORY)}
    out = {"figures": _rounded(scores), "curve": curve, "train_loss": losses}
    if with_keys:
        head, document = typical(model)
        out["key_space"] = {"head": head, "document": document, "snapshots": plane(snapshots, head, document)}
    return out


def typical(model) -> tuple[int, int]:
    """(head, document) to draw: the head with the largest positive share among KEY_DOCUMENTS documents, and that of
    these documents whose share in it is nearest to their mean."""
    import torch

    from ..focused import FocusedAttention
    from ..methods.focused import lane_contexts, positive_share
    from ..zoo.recipes import topic

    n = KEY_DOCUMENTS
    settings = FocusedAttention((topic.MEMORY_LAYER,), memory_positions=False)
    with torch.no_grad(), settings(model) as focused, focused.recording() as masses:
        model(topic.previous_then_current(n, topic.HELDOUT_SEED), contexts=lane_contexts(n, n))
    share = positive_share(masses[topic.MEMORY_LAYER][n:, :, KEY_TOKENS]).mean(2)  # [documents, heads]
    head = int(share.mean(0).argmax())
    return head, int((share[:, head] - share[:, head].mean()).abs().argmin())


@measurement("crossbatch-ablations", model=None, seed=SEED)
def ablations() -> dict[str, Any]:
    """Crossbatch on the topic task: with and without gradients through the contexts, and retrofitted to a plain model."""
    import torch

    from ..results import write_json
    from ..zoo.recipes import topic

    file = kept("crossbatch-ablations")
    parts = json.loads(file.read_text()) if file.is_file() else {}
    with torch.inference_mode(False), torch.enable_grad():
        for seed in SEEDS:
            for name, variant in VARIANTS.items():
                key = f"{name}, seed {seed}"
                if seed in variant.seeds and key not in parts:
                    parts[key] = part(variant, seed, with_keys=name == "differentiable" and seed == SEED)
                    write_json(file, parts)
            key = f"base, seed {seed}"
            if key not in parts:
                model = _base(seed).eval()
                parts[key] = {"figures": _rounded({str(d): topic.measure(model, d) for d in (0, *IN_MEMORY)})}
                write_json(file, parts)
    order = [*VARIANTS, "base"]
    rows = [
        {"variant": key.rsplit(", seed ", 1)[0], "seed": int(key.rsplit(" ", 1)[1]), **what}
        for key, what in parts.items()
    ]
    rows.sort(key=lambda row: (order.index(row["variant"]), row["seed"]))
    keys = next(r.pop("key_space") for r in rows if "key_space" in r)
    settings = {
        name: {"d": v.d, "steps": v.steps, "learning_rate": v.learning_rate, "retrofit": v.retrofit}
        for name, v in VARIANTS.items()
    }
    return {"variants": settings, "in_memory": [0, *IN_MEMORY], "rows": rows, "key_space": keys}
