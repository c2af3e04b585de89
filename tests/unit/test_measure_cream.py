"""The measurements of chapter 10: their arms, their statistics, and that a killed run goes on."""

import json

import numpy as np
import pytest
import torch

import lcx
from lcx.measure import cream, cream_text
from lcx.results import results_dir
from lcx.zoo.recipes.lm_256 import stream


@pytest.mark.parametrize("factor", [8, 64])
def test_every_arm_gives_labels_of_its_kind(factor):
    length = cream.WINDOW * factor
    for name, draw in cream.samplers(factor).items():
        for seed in range(20):
            labels = draw(np.random.default_rng(seed))
            assert labels[0] == 0 or name == "randpos"
            assert (np.diff(labels) > 0).all() and labels[-1] < length
            assert len(labels) == (length if name == "full" else cream.WINDOW), name


def test_the_uniform_middle_is_uniform_and_the_released_one_is_narrow():
    from scipy import stats

    def middles(name):  # where the middle of relativity starts, as a share of its range
        draw = cream.samplers(64)[name]
        rows = [draw(np.random.default_rng(seed)) for seed in range(1500)]
        return np.array([r[21] for r in rows if (np.diff(r[:21]) == 1).all() and r[21] - r[20] > 1])

    alpha = lcx.methods.cream.sample_alpha(64, np.random.default_rng(0), sigma=6400.0, size=4000)
    assert stats.kstest(alpha, stats.uniform(1, 63).cdf).pvalue > 0.01
    wide, narrow = middles("cream-uniform"), middles("cream-released")
    assert narrow.max() < 38 * 64 < 48 * 64 < wide.max()  # the released alpha stays within 32.5 ± 5


def test_the_interval_is_students():
    from scipy import stats

    values = [0.1, 0.4, 0.35, 0.2, 0.25]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = cream.t_interval(values)
    assert found["mean"] == pytest.approx(0.26) and found["seeds"] == 5
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert cream.t_interval([0.3]) == {"mean": 0.3, "low": None, "high": None, "seeds": 1}


def test_pairs_are_of_one_seed_and_the_middle_is_the_middle():
    def row(arm, seed, value):
        return {"arm": arm, "scaling": "yarn", "seed": seed, "accuracy": {"64": value}}

    ends, middle = [0.0] * 9, [0.0] * 3 + [0.9] * 3 + [0.0] * 3
    rows = [row("a", 0, middle), row("a", 1, ends), row("b", 0, ends), row("b", 1, ends), row("b", 2, middle)]
    all_depths, mid = cream.summary(rows, [("a", "b")])["paired"]
    assert all_depths["mean"] == pytest.approx(0.15) and all_depths["wins"] == 1 and all_depths["seeds"] == 2
    assert mid["depths"] == "middle" and mid["mean"] == pytest.approx(0.45)


def test_arms_of_one_seed_read_the_same_text_and_no_mask_is_the_trap(monkeypatch):
    model = lcx.zoo.load("needle-33-64", device="cpu")[0]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    seen = {}
    forward = type(model).forward

    def spy(self, *args, **kwargs):
        seen.setdefault(arm, []).append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    losses = {}
    for arm in ("cream", "pose", "no-mask"):
        fresh = lcx.zoo.load("needle-33-64", device="cpu")[0]
        fresh.load_state_dict(weights)
        losses[arm] = cream.extend(fresh, arm, "yarn", 8, seed=0, steps=1)
    for arm in ("pose", "no-mask"):
        assert torch.equal(seen[arm][0]["input_ids"], seen["cream"][0]["input_ids"])
    assert torch.equal(seen["cream"][0]["position_ids"], seen["no-mask"][0]["position_ids"])
    assert seen["cream"][0]["attention_mask"].min() == 1 and seen["no-mask"][0].get("attention_mask") is None
    assert losses["no-mask"] > 1.5 * losses["cream"], "without the mask the needle is out of sight"


def test_the_copying_model_scores_itself():
    model = lcx.zoo.load("needle-33-64", device="cpu")[0]
    found = cream.accuracy(model, (64, 512), sequences=8)
    assert np.mean(found["64"]) > 0.99 and np.mean(found["512"]) < 0.1
    with cream.zero_shot(model, "selfextend", 8):
        assert model(torch.zeros(1, 512, dtype=torch.long)).logits.isfinite().all()


def test_a_killed_measurement_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cream, "kept", lambda name: tmp_path / "kept.json")
    monkeypatch.setattr(cream, "trained", lambda name, seed: lcx.zoo.load(name, device="cpu")[0])
    monkeypatch.setitem(cream.STEPS, 8, 1)
    cells = [("zero-shot", "none", 0), ("cream", "yarn", 0), ("pose", "yarn", 0)]
    whole = cream.measure("x", cells, 8, (64, 128), 8, [("cream", "pose")])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [r["arm"] for r in kept] == ["zero-shot", "cream", "pose"] and len(whole["paired"]) == 4
    (tmp_path / "kept.json").write_text(json.dumps(kept[:2]))
    again = cream.measure("x", cells, 8, (64, 128), 8, [("cream", "pose")])
    strip = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]  # noqa: E731
    assert strip(again["rows"]) == strip(whole["rows"])


def test_real_text_by_position():
    model, tokenizer = lcx.zoo.load("lm-256", device="cpu")
    tokens = stream(tokenizer, "heldout")
    stretches = tokens[:1024].view(1, 1024)
    fresh = cream_text.one(model, tokens, stretches, "fresh", "none", 0, factor=4)
    plain = cream_text.one(model, tokens, stretches, "zero-shot", "none", 0, factor=4)
    assert len(fresh) == len(plain) == 8 and plain[-1] > fresh[-1] + 0.5
    trained = cream_text.one(model, tokens, stretches, "cream", "yarn", 0, factor=4, steps=1)
    assert trained[-1] < plain[-1] and model.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("name", ["cream-needles", "cream-64x"])
def test_the_committed_summary_is_that_of_the_committed_rows(name):
    if not (results_dir() / f"{name}.json").is_file():
        pytest.skip("not measured yet")
    data = lcx.result(name)
    pairs = dict.fromkeys((p["a"], p["b"]) for p in data["paired"])
    again = json.loads(json.dumps(cream.summary(data["rows"], list(pairs))))
    assert again == {"means": data["means"], "paired": data["paired"]}
    assert all(len(r["accuracy"][n]) == 9 for r in data["rows"] for n in r["accuracy"])
