"""`lcx train landmark`: rows without landmarks, what is trained, checkpoints, resume, bad input, and two processes."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import lcx
from lcx import LandmarkAttention, cli
from lcx.errors import LcxError
from lcx.finetune import finetune
from lcx.finetune_focused import FocusedSettings
from lcx.finetune_landmark import LandmarkSettings
from tests.unit import test_train_distributed as processes
from tests.unit.test_train import make_tiny, model_of, quiet_cpu  # noqa: F401

BLOCK, ROW = 8, 32  # 28 tokens of text and 4 landmarks
WORDS = 1024  # of the tokenizer, so this is the landmark's id


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def settings(tiny):
    data = (str(tiny / "text.txt"),)
    return LandmarkSettings(
        str(tiny), data, steps=6, batch_size=2, learning_rate=3e-3, block_size=BLOCK, train_length=ROW
    )


def embeddings(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_rows_are_text_alone_and_every_token_is_predicted_once(tiny, settings):
    model, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
    text = "the Congress <landmark> shall have power. " * 40
    method = settings.method(model, tokenizer, [text])
    assert method.new_tokens == (WORDS,) and model.config.mem_id == WORDS
    documents = method.documents()
    assert documents.inputs.shape[1:] == (1, ROW // BLOCK * (BLOCK - 1)) and documents.inputs.max() < WORDS
    stream = documents.inputs.flatten()
    assert tokenizer.decode(stream[1:]).startswith("the Congress <landmark> shall have power. the Congress <")
    assert torch.equal(documents.targets.flatten()[:-1], stream[1:])
    assert WORDS in tokenizer(text).input_ids  # which is what a careless reader would have trained on


def test_the_loss_is_that_of_the_next_tokens_of_the_text(tiny, settings, tmp_path):
    text = " ".join((tiny / "text.txt").read_text().split()[:50])
    (tmp_path / "short.txt").write_text(text)
    s = dataclasses.replace(settings, data=(str(tmp_path / "short.txt"),), steps=1)
    model, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
    method = s.method(model, tokenizer, [text])
    documents = method.documents()
    assert len(documents) in (2, 3)
    s = dataclasses.replace(s, batch_size=len(documents))  # one batch has all rows, in whatever order
    card = finetune(s, tmp_path / "out")
    assert card["tokens"] == documents.inputs.numel()
    with torch.no_grad(), LandmarkAttention(BLOCK, None, train_length=ROW)(model):
        logits = model(documents.inputs[:, 0]).logits
    targets = documents.targets[:, 0]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert card["train_loss"] == [[1, pytest.approx(by_hand.item(), abs=1e-4)]]


@pytest.mark.slow
def test_training_leaves_a_checkpoint_that_reads_by_landmarks(tiny, settings, tmp_path):
    state = torch.get_rng_state()
    settings = dataclasses.replace(settings, steps=15, learning_rate=1e-2)
    card = finetune(settings, tmp_path / "out", save_steps=5, command="lcx train landmark …")
    assert torch.equal(torch.get_rng_state(), state)
    losses = [loss for _, loss in card["train_loss"]]
    assert len(losses) == 15 and losses[-1] < losses[0] - 1
    assert card == json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["steps"] == 15 and card["tokens"] == 15 * 2 * ROW // BLOCK * (BLOCK - 1)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"card.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    c = model.config
    assert (c.mem_freq, c.mem_id, c.train_context_length, c.include_landmark_in_loss) == (
        BLOCK - 1,
        WORDS,
        ROW,
        False,
    )
    assert tokenizer.convert_tokens_to_ids("<landmark>") == WORDS and c.use_cache
    prompt = tokenizer("the Congress shall have power to lay " * 20, return_tensors="pt").input_ids
    with LandmarkAttention.of(model, top_k=1)(model) as landmark, torch.no_grad():
        assert (landmark.settings.block_size, landmark.settings.train_length) == (BLOCK, ROW)
        loss = model(prompt, labels=prompt).loss.item()
        out = model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert out.shape[1] == prompt.shape[1] + 9 and out.max() < WORDS
    plain, words = lcx.load(tiny, device="cpu", dtype=torch.float32)
    lcx.add_landmark(plain, words)
    with LandmarkAttention(BLOCK, 1, train_length=ROW)(plain), torch.no_grad():
        assert loss < plain(prompt, labels=prompt).loss.item() - 1
    assert not torch.equal(embeddings(tmp_path / "out")[WORDS], plain.get_input_embeddings().weight[WORDS])


@pytest.mark.slow
def test_options_that_save_memory_change_nothing(settings, tmp_path):
    def trained(name, **changes):
        card = finetune(dataclasses.replace(settings, steps=3, **changes), tmp_path / name)
        return [loss for _, loss in card["train_loss"]], load_file(tmp_path / name / "model.safetensors")

    losses, weights = trained("plain", batch_size=4)
    for name, changes in {
        "accumulated": {"gradient_accumulation": 2},
        "checkpointing": {"batch_size": 4, "gradient_checkpointing": True},
    }.items():
        again, same = trained(name, **changes)
        assert again == pytest.approx(losses, abs=1e-4)
        for tensor, w in weights.items():
            torch.testing.assert_close(same[tensor], w, rtol=0, atol=1e-4)
    half, _ = trained("half", batch_size=4, bf16=True)
    assert half != losses and half == pytest.approx(losses, abs=0.1)
    assert trained("other", batch_size=4, seed=1)[0] != losses


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_trains_the_landmark_and_is_merged(tiny, settings, tmp_path, tied):
    pytest.importorskip("peft")
    if not tied:
        model, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(tmp_path / "untied"), tokenizer.save_pretrained(tmp_path / "untied")
        tiny = tmp_path / "untied"
    settings = dataclasses.replace(
        settings, model=str(tiny), lora_rank=2, steps=15, learning_rate=1e-2, gradient_checkpointing=not tied
    )
    card = finetune(settings, tmp_path / "out")
    assert 0 < card["trained_parameters"] < card["parameters"] // 10
    assert card["train_loss"][-1][1] < card["train_loss"][0][1] - 0.1
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    plain, words = lcx.load(tiny, device="cpu", dtype=torch.float32)
    assert lcx.add_landmark(plain, words) == model.config.mem_id == lcx.add_landmark(model, tokenizer)
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    embedding = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    assert changed == embedding | {n for n in before if "_proj" in n}
    name = "model.embed_tokens.weight"
    assert (before[name] != after[name]).any(1).nonzero().flatten().tolist() == [WORDS]


def test_a_finished_run_is_kept_and_another_is_refused(tiny, settings, tmp_path):
    out = tmp_path / "out"
    settings = dataclasses.replace(settings, steps=1)
    card = finetune(settings, out)
    assert finetune(settings, out) == card
    with pytest.raises(LcxError, match=r"block_size 8, not 16: give another --out"):
        finetune(dataclasses.replace(settings, block_size=16), out)
    focused = FocusedSettings(
        str(tiny), settings.data, window=ROW, steps=1, batch_size=2, learning_rate=settings.learning_rate
    )
    with pytest.raises(LcxError, match=r"holds a training with \w+ None, not .+: give another --out"):
        finetune(focused, out)
    # Trained once, it can be trained on: token and row are kept.
    again = dataclasses.replace(settings, model=str(out))
    finetune(again, tmp_path / "again")
    assert embeddings(tmp_path / "again").shape == embeddings(out).shape == (WORDS + 1, 32)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_interrupted_in_this_process_then_resumed(settings, tmp_path, monkeypatch, rank):
    from transformers import Trainer

    settings = dataclasses.replace(settings, lora_rank=rank)
    whole = finetune(settings, tmp_path / "whole")

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    out, compute_loss = tmp_path / "out", Trainer.compute_loss
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "compute_loss", stop)
        finetune(settings, out, save_steps=2)
    resumed = finetune(settings, out, save_steps=2)
    assert resumed["train_loss"] == whole["train_loss"] and resumed["seconds"] is None
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--block-size", "1"], "block_size 1 holds no token"),
        (["--block-size", "0"], "block_size 0 holds no token"),
        (["--block-size", "7"], "train_length 32 is no multiple of block_size 7: use 28"),
        (["--block-size", "64"], "train_length 32 is no multiple of block_size 64: use 64"),
        (["--train-length", "72"], "train_length 72 is more than the model's window of 64"),
        (["--data", "no/such/file"], "no file or folder no/such/file"),
        (["--batch-size", "600"], "rows of 32 tokens, one step needs 600"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_options_are_one_clear_line(tiny, tmp_path, monkeypatch, capsys, options, words):
    base = ["lcx", "train", "landmark", str(tiny), "--out", str(tmp_path / "out")]
    base += ["--train-length", str(ROW), "--block-size", str(BLOCK)]
    data = [] if "--data" in options else ["--data", str(tiny / "text.txt")]
    monkeypatch.setattr(sys, "argv", [*base, *data, *options])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert not (tmp_path / "out" / "card.json").exists()


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    args = ["train", "landmark", str(tiny), "--data", str(tiny / "text.txt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(
        sys, "argv", ["lcx", *args, "--steps", "2", "--batch-size", "1", "--block-size", "16"]
    )
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert capsys.readouterr().out.splitlines()[-1].endswith("at step 2, 120 tokens")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["made_by"]["command"].startswith(f"lcx train landmark {tiny} --data ")
    assert card["settings"]["learning_rate"] == 2e-5 and card["settings"]["block_size"] == 16
    config = model_of(tmp_path / "out").config
    assert (config.mem_freq, config.train_context_length) == (15, 64)


# In processes of their own -----------------------------------------------------------------------------------------


def command(tiny, out, *more):
    options = [
        "--data",
        tiny / "text.txt",
        "--block-size",
        BLOCK,
        "--train-length",
        ROW,
        "--learning-rate",
        "3e-3",
    ]
    options += ["--steps", processes.STEPS, "--save-steps", 3]
    return ["-m", "lcx", "train", "landmark", tiny, "--out", out, *options, *more]


@pytest.mark.slow
def test_two_processes_killed_and_started_again_train_as_one_that_accumulates(tiny, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    processes.run(*command(tiny, alone, "--batch-size", 2, "--gradient-accumulation", 2))
    args = [*processes.TWO, *command(tiny, together, "--batch-size", 2)]
    processes.killed_after_a_checkpoint(args, together)
    said = processes.run(*args)
    assert said.count(f"at step {processes.STEPS}") == 1, said
    assert processes.losses(together) == pytest.approx(processes.losses(alone), abs=1e-4)
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, together))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)
