"""CREAM's measurement for a GPU, at tiny size on the CPU: the same functions, the same figures."""

import json

import pytest
import torch

import lcx
from lcx import evaluate, measure
from lcx.errors import LcxError
from lcx.measure import smollm2_cream
from tests.unit.test_train import make_tiny, quiet_cpu  # noqa: F401

LENGTHS = {"passkey in filler": (160, 256), "passkey in prose": (256,), "key-value": (192,)}
DEPTHS, SAMPLES, WIDTH = (0.0, 1.0), 3, 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the tiny checkpoint, cards, trained checkpoints): 8 steps by CREAM and by PoSE, from a window of 64 to 256."""
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    out = tmp_path_factory.mktemp("out")
    settings = smollm2_cream.TRAINING | {"steps": 8, "batch_size": 2, "gradient_accumulation": 2}
    settings |= {"learning_rate": 3e-3, "warmup_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCX_STATIC", "1")
        patch.setattr("torch.cuda.is_available", lambda: False)
        cards, tuned = smollm2_cream.train(
            str(tiny), (str(tiny / "text.txt"),), ("cream", "pose"), (0,), lambda n: out / n, **settings
        )
    return tiny, cards, tuned


def test_both_samplers_get_the_same_training_and_leave_checkpoints_for_the_long_window(trained):
    _, (cream, pose), tuned = trained
    assert {k for k in cream["settings"] if cream["settings"][k] != pose["settings"][k]} == {"sampler"}
    assert cream["tokens"] == pose["tokens"] == 8 * 4 * 64
    assert cream["train_loss"] != pose["train_loss"]
    assert [(sampler, seed) for sampler, seed, _ in tuned] == [("cream", 0), ("pose", 0)]
    for _, _, folder in tuned:
        model, _ = lcx.load(folder, device="cpu", dtype=torch.bfloat16)
        rope = model.config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == (
            "yarn",
            4.0,
            64,
        )
        assert model.config.max_position_embeddings == 256
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "far positions need it"


def test_four_models_are_compared_on_the_same_prompts_and_texts(trained, tmp_path, monkeypatch):
    tiny, _, tuned = trained
    plain, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
    ids = tokenizer((tiny / "text.txt").read_text()).input_ids
    texts = {"first": ids[:256], "second": ids[1000:1256]}
    before = {n: p.clone() for n, p in plain.state_dict().items()}

    def compared():
        return smollm2_cream.compare(
            plain,
            tokenizer,
            tuned,
            texts,
            lengths=LENGTHS,
            depths=DEPTHS,
            samples=SAMPLES,
            width=WIDTH,
            keep=lambda part: tmp_path / f"{part}.json",
        )

    out = compared()
    models = [("plain", None), ("zero-shot", None), ("cream", 0), ("pose", 0)]
    places = [(task, n, d) for task, sizes in LENGTHS.items() for n in sizes for d in DEPTHS]
    assert [(c["model"], c["seed"], c["task"], c["length"], c["depth"]) for c in out["cells"]] == [
        (*m, *p) for m in models for p in places
    ]
    for c in out["cells"]:
        assert len(c["right"]) == c["n"] == SAMPLES
        assert c["hits"] == sum(r == c["of"] for r in c["right"])
        assert 0 <= c["low"] <= c["accuracy"] <= c["high"] <= 1 and c["high"] > 0.5
    assert [(r["model"], r["seed"]) for r in out["nll"]] == models
    loss = {r["model"]: torch.tensor(r["nll"]) for r in out["nll"]}
    assert all(curve.shape == (2, 4) for curve in loss.values())
    assert (loss["plain"] != loss["zero-shot"]).all(), "YaRN changes every position"
    for name in ("cream", "pose"):
        assert (loss[name] < loss["zero-shot"]).all(), "trained on this text"
    assert not torch.equal(loss["cream"], loss["pose"])
    assert plain.config.max_position_embeddings == 64
    assert plain.config.rope_parameters["rope_type"] == "default"
    assert all(torch.equal(p, before[n]) for n, p in plain.state_dict().items()), "plain stays plain"

    seen = {}  # the prompts are those of every other model
    for file in tmp_path.glob("*-key-value.json"):
        rows = json.loads(file.read_text())["rows"]
        seen[file] = [(r["seed"], r["answer"]) for r in rows]
    assert len(seen) == 4 and len({tuple(s) for s in seen.values()}) == 1

    def forbidden(*_, **__):
        raise AssertionError("a finished part is computed again")

    monkeypatch.setattr(evaluate, "exact_match", forbidden)
    monkeypatch.setattr("lcx.tasks.perplexity.nll_by_position", forbidden)
    assert compared() == out


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(LcxError, match="smollm2-cream needs a CUDA GPU: run it on one"):
        measure.run("smollm2-cream")
