"""The zoo: the committed checkpoints keep what their cards promise, and training is repeatable and resumable."""

import dataclasses
import json
import shutil

import pytest
import torch

import lcx
from lcx import zoo
from lcx.errors import CorruptFileError, LcxError, ModelNotFoundError
from lcx.fetch import sha256
from lcx.train import lanes, stepped
from lcx.zoo import training
from lcx.zoo.recipes import lm_256, needle_64, topic


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "real_model" not in request.keywords:
        monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LCX_STATIC", "1")


@pytest.fixture
def small():
    """The needle-64 recipe, saving every 4 steps and without its stop rule."""
    return dataclasses.replace(needle_64.RECIPE, save_steps=4, batch_size=4, stop_accuracy=None)


@pytest.mark.parametrize("name", zoo.names())
def test_committed_checkpoint_and_card(name):
    card = zoo.card(name)
    assert card["name"] == name and card["made_by"]["command"] == f"lcx zoo train {name}"
    assert {"seed", "versions", "device", "date"} <= card["made_by"].keys()
    assert {p.name for p in zoo.folder(name).iterdir()} == {*card["sha256"], "card.json"}
    assert sum(p.stat().st_size for p in zoo.folder(name).iterdir()) < training.MAX_BYTES
    assert zoo.check_files(zoo.folder(name)) == card
    model, tokenizer = lcx.load(name, device="cpu")
    assert (
        model.dtype == torch.float32 and not model.training and model.lcx_source == f"zoo checkpoint {name}"
    )
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert len(tokenizer) == model.config.vocab_size
    recipe = zoo.recipe(name)
    assert all(getattr(model.config, k) == v for k, v in recipe.config.items() if not k.endswith("token_id"))
    assert card["recipe"] == {"batch_size": recipe.batch_size, "steps": recipe.steps, **recipe.training}


def test_needle_64_keeps_its_card():
    figures, card = zoo.verify("needle-64"), zoo.card("needle-64")
    assert figures["loss"] == pytest.approx(card["heldout"]["loss"], abs=1e-3)
    assert (
        figures["accuracy"] > 0.97 and figures["accuracy_at_128"] < 0.6 and figures["accuracy_at_512"] < 0.2
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.names() if zoo.recipe(n).contexts])
def test_models_with_a_memory_keep_their_cards(name):
    assert zoo.verify(name) == pytest.approx(zoo.card(name)["heldout"], abs=2e-3)
    settings = lcx.FocusedAttention.of(lcx.load(name, device="cpu")[0])
    config = zoo.recipe(name).config
    assert (
        list(settings.memory_layers) == config["mem_layers"]
        and settings.window == config["max_position_embeddings"]
    )
    assert settings.memory_positions == config["mem_positionals"]


def test_cards_show_what_negatives_are_for():
    topics = {n: zoo.card(n)["heldout"] for n in ("topic-plain", "topic-d1", "topic-d8", "topic-d2-32")}
    assert topics["topic-d8"]["r_at_8"] > 0.5 > 0.2 > topics["topic-d1"]["r_at_8"]
    assert (
        topics["topic-plain"]["r_at_8"] < 0.2
        and topics["topic-d2-32"]["r_at_8"] > topics["topic-d8"]["r_at_8"]
    )
    assert topics["topic-d1"]["loss_at_8"] > topics["topic-d1"]["loss"] > topics["topic-d1"]["loss_at_1"]
    assert topics["topic-d2-32"]["loss_at_32"] < topics["topic-d2-32"]["loss"]
    needles = {
        n: zoo.card(n)["heldout"] for n in ("needle-memory", "needle-memory-d1", "needle-memory-plain")
    }
    assert needles["needle-memory"]["accuracy_at_48"] > 0.99 > needles["needle-memory-d1"]["accuracy_at_48"]
    assert needles["needle-memory-plain"]["accuracy"] < 0.05


@pytest.mark.slow
@pytest.mark.real_model
def test_lm_256_beats_counting_in_its_window_and_breaks_past_it():
    try:
        figures = zoo.verify("lm-256")
    except ModelNotFoundError as e:
        pytest.skip(str(e))
    card = zoo.card("lm-256")["heldout"]
    assert figures == pytest.approx({k: card[k] for k in figures}, rel=1e-2)
    assert figures["loss"] < card["bigram_loss"] - 0.5 < card["unigram_loss"] - 1
    assert figures["loss_at_256_to_511"] > figures["loss"] + 0.3
    assert figures["loss_at_512_to_1023"] > figures["loss"] + 1.0


def test_lm_256_tokenizer_gives_back_every_text():
    _, tokenizer = lcx.load("lm-256", device="cpu")
    words = "Fellow-Citizens,\n\n  the façade costs $1.5 – 日本.\t"
    assert tokenizer.decode(tokenizer(words).input_ids) == words and len(tokenizer) == 1024
    assert tokenizer.bos_token_id == 0 not in tokenizer(words).input_ids


def test_needle_64_tokenizer_reads_as_the_task_counts():
    _, tokenizer = lcx.load("needle-64", device="cpu")
    assert tokenizer("<bos> f0 f15 n0 n63").input_ids == [0, 1, 16, 17, 80]


@pytest.mark.slow
@pytest.mark.real_model
def test_lm_256_baselines_of_the_card():
    try:
        counted = lm_256.baselines(lcx.load("lm-256", device="cpu")[1])
    except ModelNotFoundError as e:
        pytest.skip(str(e))
    card = zoo.card("lm-256")["heldout"]
    assert counted == pytest.approx({k: card[k] for k in counted}, abs=1e-9)


def test_windows_are_the_same_for_a_seed_and_stay_inside():
    a, b, c = (lm_256.Windows(torch.arange(1000), 20, seed=s) for s in (0, 0, 1))
    rows = torch.stack([w["input_ids"] for w in a])
    assert torch.equal(rows, torch.stack([w["input_ids"] for w in b]))
    assert not torch.equal(rows, torch.stack([w["input_ids"] for w in c]))
    assert rows.shape == (20, 256) and rows.max() < 1000 and (rows.diff() == 1).all()


def test_bigram_baseline_on_a_text_it_can_predict():
    """0 1 0 1 …: unigrams cannot do better than ln 2, bigrams know the next token."""
    row = torch.tensor([0, 1] * 5000)
    unigram, bigram = lm_256.bigram_baseline(2, row, row)
    assert unigram == pytest.approx(0.6931, abs=1e-3) and bigram < 0.01


@pytest.mark.slow
def test_training_is_repeatable_and_leaves_the_global_generators_alone(small, tmp_path):
    state = torch.get_rng_state()
    one = training.run(small, tmp_path / "one", seed=3, steps=6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    two = training.run(small, tmp_path / "two", seed=3, steps=6)
    other = training.run(small, tmp_path / "other", seed=4, steps=6)
    assert one["sha256"] == two["sha256"] and one["heldout"] == two["heldout"]
    assert one["sha256"]["model.safetensors"] != other["sha256"]["model.safetensors"]
    assert one["made_by"]["command"] == "lcx zoo train needle-64 --seed 3 --steps 6" and one["steps"] == 6
    assert one["tokens"] == 6 * 4 * 64 and one == json.loads((tmp_path / "one" / "card.json").read_text())
    assert one["sha256"]["model.safetensors"] == sha256(tmp_path / "one" / "model.safetensors")


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_weights(small, tmp_path):
    whole = training.run(small, tmp_path / "whole", seed=0, steps=10)
    drawn = []

    class Interrupted(needle_64.NeedleCopy):
        def __getitem__(self, i):
            drawn.append(i)
            if len(drawn) > 7 * 4:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    def data(tok, seed, examples):
        return Interrupted(examples, seed), None

    with pytest.raises(KeyboardInterrupt):
        training.run(dataclasses.replace(small, data=data), tmp_path / "resumed", seed=0, steps=10)
    assert not (tmp_path / "resumed").exists()
    work = training.work_dir(small, 0, 10)
    assert training.last_checkpoint(work).endswith("checkpoint-4")
    (work / "checkpoint-8").mkdir()  # as a kill in the middle of saving leaves it
    resumed = training.run(small, tmp_path / "resumed", seed=0, steps=10)
    assert resumed["sha256"] == whole["sha256"] and resumed["train_loss"] == whole["train_loss"]
    assert whole["seconds"] is not None and resumed["seconds"] is None and not work.exists()


@pytest.mark.slow
def test_interrupted_crossbatch_training_goes_on_in_order_with_the_contexts_of_its_step(tmp_path):
    """The schedule is stepped, so that batches or contexts of other steps would give other weights."""
    seen = []

    class Interrupted(topic.Lanes):
        def __getitem__(self, i):
            seen.append(i)
            if len(seen) > 6:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    recipe = dataclasses.replace(
        topic.RECIPES[3], save_steps=4, contexts=lanes(stepped([(0, 1), (2, 2), (5, 4)]))
    )
    whole = training.run(recipe, tmp_path / "whole", seed=0, steps=7)
    broken = dataclasses.replace(recipe, data=lambda tok, seed, n: (Interrupted(n, seed), None))
    with pytest.raises(KeyboardInterrupt):
        training.run(broken, tmp_path / "resumed", seed=0, steps=7)
    assert seen[:6] == [*range(6)] and training.last_checkpoint(training.work_dir(recipe, 0, 7))
    resumed = training.run(recipe, tmp_path / "resumed", seed=0, steps=7)
    assert resumed["sha256"] == whole["sha256"]


def test_a_changed_recipe_does_not_resume(small):
    changed = dataclasses.replace(small, config={**small.config, "hidden_size": 32})
    assert training.work_dir(small, 0, 10) != training.work_dir(changed, 0, 10)


def test_stop_rule_ends_training_early(small, tmp_path):
    card = training.run(
        dataclasses.replace(small, stop_accuracy=0.0, eval_steps=2), tmp_path / "m", seed=0, steps=9
    )
    assert card["steps"] == 2


def test_too_large_a_model_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MAX_BYTES", 1000)
    with pytest.raises(LcxError, match="the zoo allows"):
        training.run(small, tmp_path / "m", seed=0, steps=1)
    assert not (tmp_path / "m").exists()


def test_verify_notices_damage_and_false_figures(tmp_path, monkeypatch):
    shutil.copytree(zoo.folder("needle-64"), tmp_path / "needle-64")
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    card = tmp_path / "needle-64" / "card.json"
    claims = json.loads(card.read_text())
    claims["heldout"]["loss"] += 0.1
    card.write_text(json.dumps(claims))
    with pytest.raises(LcxError, match="its card says"):
        zoo.verify("needle-64")
    weights = tmp_path / "needle-64" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptFileError, match="lcx zoo train needle-64"):
        lcx.load("needle-64", device="cpu")
    weights.unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        zoo.load("needle-64")
    card.unlink()
    with pytest.raises(ModelNotFoundError, match="is not trained yet"):
        zoo.card("needle-64")


def test_unknown_names_and_steps():
    for call in (zoo.recipe, zoo.folder, zoo.card, zoo.train, zoo.verify, zoo.load, zoo.describe):
        with pytest.raises(ModelNotFoundError, match="use one of lm-256, needle-64"):
            call("lm-1b")
    with pytest.raises(LcxError, match="use 1 or more"):
        zoo.train("needle-64", steps=0)
