"""`lcx train cream`: what is trained and saved, resume, bad input."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import lcx
from lcx import cli
from lcx.errors import LcxError
from lcx.finetune import finetune
from lcx.finetune_cream import CreamSettings, PositionLabels, Rows
from lcx.presets import LISTED, PRESETS, recipe
from lcx.train import Documents
from tests.unit.test_train import make_tiny, model_of, quiet_cpu  # noqa: F401

N, FACTOR = 64, 4
SETTINGS = {"steps": 4, "batch_size": 2, "learning_rate": 3e-3, "factor": FACTOR}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tiny):
    return CreamSettings(str(tiny), (str(tiny / "text.txt"),), **SETTINGS)


def test_the_loss_is_that_of_the_text_under_the_labels(tiny, settings, tmp_path):
    card = finetune(dataclasses.replace(settings, steps=1, scaling="yarn"), tmp_path / "out")
    model, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
    ids = tokenizer((tiny / "text.txt").read_text()).input_ids
    data = Rows(Documents([ids], N, 1, 0, 0), 2, 1, settings.seed)
    draw = functools.partial(lcx.cream_positions, N, FACTOR)
    batch = PositionLabels(draw, settings.seed)([data[0], data[1]])
    with lcx.scale_rope(model, "yarn", FACTOR), torch.no_grad():
        logits = model(
            batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"]
        ).logits
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert card["train_loss"] == [[1, pytest.approx(by_hand.item(), abs=1e-4)]]
    assert card["tokens"] == 2 * N


@pytest.mark.parametrize(
    ("changes", "length"),
    [({"scaling": "yarn"}, N), ({"sampler": "pose"}, N), ({"sampler": "full", "scaling": "ntk"}, N * FACTOR)],
    ids=str,
)
def test_the_checkpoint_keeps_the_scaling(settings, tmp_path, changes, length):
    card = finetune(dataclasses.replace(settings, steps=1, **changes), tmp_path / "out")
    assert card["tokens"] == 2 * length
    config = model_of(tmp_path / "out").config
    assert config.max_position_embeddings == N * FACTOR
    kind = {"yarn": "yarn", "ntk": "default"}.get(changes.get("scaling"), "linear")
    assert config.rope_parameters["rope_type"] == kind
    if kind == "yarn":
        assert config.rope_parameters["original_max_position_embeddings"] == N
    else:
        assert config.rope_parameters.get("factor", 1) == (FACTOR if kind == "linear" else 1)
    if kind != "default":
        again = dataclasses.replace(settings, model=str(tmp_path / "out"), steps=1)
        with pytest.raises(LcxError, match=f"already has {kind} scaling"):
            finetune(again, tmp_path / "again")


def test_a_checkpoint_with_the_harmonic_blend_loads_in_a_new_process(settings, tmp_path, monkeypatch):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    finetune(dataclasses.replace(settings, steps=1, scaling="yarn_harmonic"), tmp_path / "out")
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "yarn_harmonic")  # as it is before lcx.load
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    plain, _ = lcx.load(settings.model, device="cpu", dtype=torch.float32)
    with lcx.scale_rope(plain, "yarn_harmonic", FACTOR):
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert tokenizer.model_max_length == N * FACTOR


@pytest.mark.parametrize(("released", "warned"), [(True, True), (False, False)])
def test_a_sigma_that_leaves_out_distances_is_named_before_the_training(tmp_path, recwarn, released, warned):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=1024)  # fmt: skip
    settings = CreamSettings("none", ("none",), factor=64, released=released)
    _, tokenizer = lcx.load("lm-256", device="cpu")
    settings.method(LlamaForCausalLM(config), tokenizer, [])
    said = [str(w.message) for w in recwarn if "leave out" in str(w.message)]
    assert len(said) == warned and all("% of the distances up to 65536" in s for s in said)


@pytest.mark.parametrize("rank", [0, 2])
def test_interrupted_then_resumed(settings, tmp_path, monkeypatch, rank):
    from transformers import Trainer

    if rank:
        pytest.importorskip("peft")
    settings = dataclasses.replace(settings, lora_rank=rank)
    whole = finetune(settings, tmp_path / "whole")

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    out, compute_loss = tmp_path / "out", Trainer.compute_loss
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "compute_loss", stop)
        finetune(settings, out, save_steps=2)
    resumed = finetune(settings, out, save_steps=2)
    assert resumed["train_loss"] == whole["train_loss"] and resumed["seconds"] is None
    weights, same = (load_file(f / "model.safetensors") for f in (out, tmp_path / "whole"))
    assert all(torch.equal(weights[name], same[name]) for name in same)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--factor", "0"], "factor must be a whole number of at least 1, got 0"),
        (["--factor", "8"], "k = 32 leaves no middle in a window of 64: use a whole number from 1 to 31"),
        (["--k", "32"], "k = 32 leaves no middle"),
        (["--sigma", "0"], "sigma must be positive, got 0"),
        (["--sampler", "best"], "sampler 'best' is none to train with: use one of cream, pose"),
        (["--scaling", "dynamic"], "scaling 'dynamic' is none to train with: use one of none, linear"),
        (["--sampler", "pose", "--k", "4"], "sigma, k and released are CREAM's"),
        (["--batch-size", "600"], "rows of 64 tokens, one step needs 600"),
        (["--data", "short.txt"], "tokens, one item needs 65: use more text\n"),
        (["--preset", "cream-32k"], "no preset 'cream-32k': use one of cream-released-{32k"),
        (
            ["--preset", "pose-16k-yarn", "--batch-size", "24"],
            "which 1 processes with batches of 24 cannot make",
        ),
        (["--lr-schedule", "steep"], "lr_schedule 'steep' is none: use constant, linear, cosine"),
        (["--warmup-steps", "5", "--steps", "5"], "warmup_steps 5 leave none of 5 steps"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_options_are_one_clear_line(tiny, tmp_path, monkeypatch, capsys, options, words):
    (tmp_path / "short.txt").write_text("the Congress")
    base = ["lcx", "train", "cream", str(tiny), "--out", str(tmp_path / "out"), "--factor", str(FACTOR)]
    data = str(tmp_path / options[1] if "--data" in options else tiny / "text.txt")
    monkeypatch.setattr(sys, "argv", [*base, "--data", data, *options[2 * ("--data" in options) :]])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert not (tmp_path / "out" / "card.json").exists()


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    args = ["train", "cream", str(tiny), "--data", str(tiny / "text.txt"), "--out", str(tmp_path / "out")]
    options = ["--steps", "2", "--batch-size", "1", "--factor", "2", "--released", "--scaling", "yarn"]
    monkeypatch.setattr(sys, "argv", ["lcx", *args, *options, "--gradient-checkpointing"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert capsys.readouterr().out.splitlines()[-1].endswith("at step 2, 128 tokens")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["settings"]["sampler"] == "cream" and card["settings"]["released"] is True


# Presets -----------------------------------------------------------------------------------------------------------


def names(pattern):
    """a-{b,c} -> a-b, a-c."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return {"".join(choice) for choice in itertools.product(*parts)}


def test_the_listed_presets_are_those_there_are():
    assert set().union(*map(names, LISTED)) == PRESETS.keys()
    for name in PRESETS:
        CreamSettings("llama", ("text",), preset=name, **recipe(name, {})).check()
    long = recipe("cream-covering-256k-yarn", {})
    assert (long["factor"], long["scaling"], long["released"]) == (64, "yarn_harmonic", False)
    assert (
        recipe("cream-released-64k-linear", {})["released"] and recipe("pose-128k-linear", {})["factor"] == 64
    )


@pytest.mark.parametrize("name", ["cream-released-32k-linear", "pose-16k-yarn"])
def test_a_step_of_a_preset_has_its_rows_on_any_number_of_processes(name):
    rows = PRESETS[name]["rows"]
    for processes in (1, 2, 4, 8, 16):
        for given in ({}, {"batch_size": 1}, {"batch_size": 2}):
            options = recipe(name, given, processes)
            assert options.items() >= given.items() and "rows" not in options
            assert options["batch_size"] * options["gradient_accumulation"] * processes == rows
    given = {"batch_size": 3, "gradient_accumulation": 5}
    assert recipe(name, given).items() >= given.items()
    with pytest.raises(LcxError, match=f"has {rows} rows in a step, which 3 processes"):
        recipe(name, {}, 3)


def test_a_preset_gives_the_options_that_are_not_given(tiny, tmp_path, monkeypatch):
    args = ["train", "cream", str(tiny), "--data", str(tiny / "text.txt"), "--out", str(tmp_path / "out")]
    less = ["--steps", "3", "--warmup-steps", "1", "--batch-size", "1", "--gradient-accumulation", "2"]
    monkeypatch.setattr(sys, "argv", ["lcx", *args, "--preset", "cream-released-32k-yarn", *less, "--k", "7"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    settings = json.loads((tmp_path / "out" / "card.json").read_text())["settings"]
    assert settings["preset"] == "cream-released-32k-yarn"
    given = {"steps": 3, "warmup_steps": 1, "batch_size": 1, "gradient_accumulation": 2, "k": 7}
    kept = {k: v for k, v in PRESETS[settings["preset"]].items() if k not in given and k != "rows"}
    assert settings.items() >= (kept | given | {"learning_rate": 2e-5}).items()
    config = model_of(tmp_path / "out").config
    assert config.rope_parameters["rope_type"] == "yarn_harmonic" and config.max_position_embeddings == 8 * N


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("constant", [0, 0.5, 1, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25])],
)
def test_warm_up_and_schedule(settings, tmp_path, monkeypatch, schedule, share):
    from transformers import Trainer

    groups, compute_loss = [], Trainer.compute_loss

    def note(self, *args, **kwargs):
        groups.extend(dict(g) for g in self.optimizer.param_groups[:1])
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", note)
    changes = dict(steps=6, lr_schedule=schedule, warmup_steps=2, weight_decay=0.5, adam_beta2=0.9)
    finetune(dataclasses.replace(settings, **changes), tmp_path / "out")
    assert [g["lr"] for g in groups] == pytest.approx([3e-3 * s for s in share])
    assert all(g["weight_decay"] == 0.5 and g["betas"] == (0.9, 0.9) for g in groups)
