"""Chapter 5: its figures show what they are given, and its measurement trains what it says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lcx
from lcx.attention import attach
from lcx.figures import crossbatch
from lcx.measure import crossbatch as measured
from lcx.measure import registry
from lcx.zoo.recipes import topic

LABELS = [f"{document}{chunk}" for document in "ABC" for chunk in (1, 2)]


def frame(fig, name):
    return next(f for f in fig.frames if f.name == name)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**lcx.zoo.recipe("topic-d8").config)).eval()


def test_who_sees_whom_marks_every_context_once():
    packs = lcx.crossbatch_contexts([(0, 1), (1, 2)], 6)
    fig = crossbatch.who_sees_whom({"packs": (packs.tolist(), LABELS), "none": ([[-1]] * 6, LABELS)})
    local, own, foreign = frame(fig, "0").data
    assert list(zip(local.y, local.x, strict=True)) == [(b, b) for b in range(6)]
    assert set(zip(own.y, own.x, strict=True)) == {(1, 0), (3, 2), (5, 4)}
    assert len(own.x) + len(foreign.x) == int((packs >= 0).sum())
    assert "B2 sees A2: chunk of another document (negative)" in foreign.text
    assert all(LABELS[b][0] != LABELS[c][0] for b, c in zip(foreign.y, foreign.x, strict=True))
    assert not frame(fig, "1").data[1].x and not frame(fig, "1").data[2].x
    with pytest.raises(ValueError, match="batches of one size"):
        crossbatch.who_sees_whom({"a": ([[-1]], ["A1"]), "b": ([[-1]] * 2, ["A1", "A2"])})


def test_by_memory_draws_the_mean_and_the_range_of_the_seeds():
    seeds = [{"1": {"r": 1.0, "loss": 2.0}, "8": {"r": r, "loss": 2.5}} for r in (0.2, 0.3, 0.7)]
    fig = crossbatch.by_memory({"some": seeds}, [1, 8])
    even, line = fig.data
    assert list(even.y) == [1.0, 0.125] and list(line.y) == [1.0, 0.4]
    assert line.error_y.array[1] == pytest.approx(0.3) and line.error_y.arrayminus[1] == pytest.approx(0.2)
    [loss] = crossbatch.by_memory({"some": seeds}, [1, 8], metric="loss").data
    assert list(loss.y) == [2.0, 2.5]


def test_curves_draws_every_seed_and_names_each_training_once():
    curve = [{"step": s, "loss": 3 - s / 10, "r": s / 20} for s in (0, 5, 10)]
    fig = crossbatch.curves({"a": [curve, curve], "b": [curve]}, chance=0.125, d=8)
    assert len(fig.data) == 6 and [t.name for t in fig.data if t.showlegend] == ["a", "b"]
    assert list(fig.data[1].y) == [0.0, 0.25, 0.5]


def test_gradient_map_marks_the_own_future_and_nothing_else():
    clean = torch.eye(6).tolist()
    leaky = torch.eye(6)
    leaky[2, 3] = leaky[0, 5] = 0.1  # B1 sees B2, a leak; A1 sees C2, another document
    fig = crossbatch.gradient_map({"clean": clean, "leaky": leaky.tolist()}, LABELS)
    assert not frame(fig, "0").data[1].x
    heat, leaks = frame(fig, "1").data
    assert (list(leaks.y), list(leaks.x)) == ([2], [3])
    assert heat.z[0][5] == -1.0 and heat.z[5][0] is None


def test_key_space_puts_the_document_of_the_queries_first(model):
    snapshots = [(s, *measured.keys_and_queries(model, 4, seed=3)) for s in (0, 7)]
    drawn = measured.plane(snapshots, head=2, document=1)
    keys = snapshots[1][1][2][:, measured.KEY_TOKENS]
    centred = keys - keys.mean((0, 1))
    plane = torch.tensor(drawn[1]["keys"])
    # PCA: the plane holds as much of the keys as the two largest singular values do
    held = torch.linalg.svdvals(centred.flatten(0, 1))[:2].square().sum()
    assert plane.square().sum().item() == pytest.approx(held.item(), rel=1e-2)
    norms = (plane.norm(dim=-1), centred.norm(dim=-1)[[1, 0, 2, 3]])
    assert (norms[0] <= norms[1] + 2e-3).all()  # and every point is that of its own key
    fig = crossbatch.key_space(drawn, {0: 0.1, 7: 0.2})
    own = frame(fig, "1").data[1]
    assert [list(p) for p in zip(own.x, own.y, strict=True)] == drawn[1]["keys"][0]
    assert len(frame(fig, "1").data[0].x) == 3 * len(own.x)


def test_detached_contexts_change_gradients_and_nothing_else(model):
    """Forward equal to crossbatch; backward, a foreign chunk gets nothing, the own window its usual gradient."""
    rows, contexts = topic.previous_then_current(4, seed=5), lcx.lane_contexts(4, 2)
    embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
    runs = {}
    for name in ("crossbatch", "detached"):
        within = (
            lcx.FocusedAttention.of(model)(model)
            if name == "crossbatch"
            else attach(model, {topic.MEMORY_LAYER: measured.detached_crossbatch})
        )
        with within:
            logits = model(inputs_embeds=embedded, contexts=contexts).logits
        [gradient] = torch.autograd.grad(logits[4:].square().sum(), embedded)
        runs[name] = logits, gradient
    assert torch.equal(runs["crossbatch"][0], runs["detached"][0])
    assert (runs["crossbatch"][1][:4].flatten(1).abs().sum(1) > 0).all()
    assert (runs["detached"][1][:4] == 0).all()
    assert (runs["detached"][1][4:].flatten(1).abs().sum(1) > 0).all()


def test_the_measurement_keeps_finished_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "SEEDS", (0,))
    monkeypatch.setattr(measured, "PROBES", (0, 2))
    some = {"differentiable": measured.Variant(2, 2), "detached": measured.Variant(2, 2, detached=True)}
    monkeypatch.setattr(measured, "VARIANTS", some)
    monkeypatch.setattr(
        measured, "_base", lambda seed: LlamaForCausalLM(LlamaConfig(**lcx.zoo.recipe("topic-d8").config))
    )
    first = registry["crossbatch-ablations"]()
    assert [(r["variant"], r["seed"]) for r in first["rows"]] == [
        ("differentiable", 0),
        ("detached", 0),
        ("base", 0),
    ]
    for row in first["rows"][:2]:
        assert [p["step"] for p in row["curve"]] == [0, 2]
        assert set(row["figures"]) == {"0", "1", "2", "8", "32"} and row["figures"]["1"]["r"] == 1
    assert first["rows"][0]["curve"][0] == first["rows"][1]["curve"][0]  # the same weights to start with
    assert [s["step"] for s in first["key_space"]["snapshots"]] == [0, 2]

    def never(*a, **k):
        raise AssertionError("trained again")

    monkeypatch.setattr(measured, "part", never)
    assert registry["crossbatch-ablations"]() == first
