"""Crossbatch training: schedules, packed documents, transformers.Trainer around them, and `lcx train focused`."""

from __future__ import annotations

import dataclasses
import json
import random
import sys

import pytest
import torch

import lcx
from lcx import FocusedAttention, cli
from lcx.errors import LcxError
from lcx.finetune import finetune, read_texts
from lcx.finetune_focused import FocusedSettings, default_layers, read_schedule
from lcx.train import CrossBatchTrainer, Documents, collate, constant, lanes, packs, sampled, stepped

CHUNK = 16


def make_tiny(folder):
    """A checkpoint of three random layers with a window of 64 tokens, and 6,000 tokens of text of few words, text.txt."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(lcx.zoo.folder("lm-256"))
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = "the Congress of these United States shall have power to lay and collect taxes".split()
    text = " ".join(random.Random(0).choices(words, k=4000))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet_cpu(monkeypatch):
    monkeypatch.setenv("LCX_STATIC", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def settings(tiny):
    return FocusedSettings(
        str(tiny),
        (str(tiny / "text.txt"),),
        window=CHUNK,
        steps=6,
        batch_size=2,
        learning_rate=3e-3,
    )


def model_of(tiny):
    return lcx.load(tiny, device="cpu", dtype=torch.float32)[0]


def rows(packs=4, chunks=4, seed=0):
    """Random items as Documents gives them."""
    g = torch.Generator().manual_seed(seed)
    stream = torch.randint(1, 1024, (packs * chunks * CHUNK + 1,), generator=g).tolist()
    return Documents([stream], CHUNK, chunks)


def trainer_of(model, data, out, contexts, callbacks=(), **arguments):
    from transformers import TrainingArguments

    defaults = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, max_grad_norm=0.0)
    fixed = dict(
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, remove_unused_columns=False, seed=1
    )
    return CrossBatchTrainer(
        model=model,
        args=TrainingArguments(str(out), disable_tqdm=True, **fixed, **(defaults | arguments)),
        train_dataset=data,
        data_collator=collate,
        contexts=contexts,
        in_order=True,
        callbacks=list(callbacks),
    )


class Gradients:
    """A Trainer callback that keeps the gradients of every step as the optimiser gets them."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Keep(TrainerCallback):
            steps = []

            def on_pre_optimizer_step(self, args, state, control, model, **_):
                self.steps.append({n: p.grad.clone() for n, p in model.named_parameters()})

        return Keep()


# Schedules ---------------------------------------------------------------------------------------------------------


def test_schedules_depend_on_the_step_alone():
    assert [constant(3)(s) for s in (0, 9)] == [3, 3]
    d = stepped([(0, 2), (5, 64)])
    assert [d(s) for s in (0, 4, 5, 900)] == [2, 2, 64, 64]
    d = sampled((2, 128), seed=4)
    drawn = [d(s) for s in range(400)]
    assert set(drawn) == {2, 128} and 150 < drawn.count(2) < 250
    state = torch.get_rng_state()
    assert [sampled((2, 128), seed=4)(s) for s in (399, 7, 7)] == [drawn[399], drawn[7], drawn[7]]
    assert torch.equal(torch.get_rng_state(), state)
    assert [sampled((2, 128), seed=5)(s) for s in range(400)] != drawn
    for stages in ([], [(1, 2)], [(0, 2), (0, 3)], [(0, 1), (9, 2), (5, 3)]):
        with pytest.raises(LcxError, match="start at step 0"):
            stepped(stages)
    with pytest.raises(LcxError, match="at least one"):
        sampled(())


def test_contexts_follow_the_schedule():
    table = packs(4, stepped([(0, 1), (3, 3)]))
    assert table(0, 8).shape == (8, 1) and table(3, 8).shape == (8, 3)
    seen = [(row >= 0).sum().item() for row in table(3, 8)]
    # The first document has none before it, the second the mixture of LongLLaMA-3B: (0, 0) (1, 1) (2, 1) (3, 0).
    assert seen == [0, 1, 2, 3, 0, 2, 3, 3]
    assert packs(4, constant(0))(0, 8).shape == (8, 0)
    assert lanes(constant(64))(0, 8).shape == (8, 4)  # not more than there are


def test_read_schedule():
    d, taken = read_schedule("constant", "3")
    assert d(10) == 3 and taken == [3]
    d, taken = read_schedule("stepped", "0:1,1000:7")
    assert (d(999), d(1000), taken) == (1, 7, [1, 7])
    d, taken = read_schedule("sampled", "2,128")
    assert {d(s) for s in range(50)} == {2, 128} == set(taken)
    bad = [
        ("constant", "2,3"),
        ("constant", "x"),
        ("constant", "-1"),
        ("stepped", "3"),
        ("sampled", "0:1"),
        ("linear", "3"),
        ("stepped", "0:1:2"),
    ]
    for kind, values in bad:
        with pytest.raises(LcxError, match="use constant 3, stepped"):
            read_schedule(kind, values)


def test_default_layers_are_those_of_longllama():
    assert default_layers(26) == (6, 12, 18) and default_layers(32) == (8, 16, 24)
    assert [default_layers(n) for n in (4, 3, 1)] == [(1, 2, 3), (1, 2), (0,)]


# Documents ---------------------------------------------------------------------------------------------------------


def test_no_target_is_lost_where_chunks_and_documents_meet():
    data = Documents([[5, 6, 7], [8, 9]], chunk=2, chunks_per_doc=2, bos=1, eos=2)
    # 1 5 6 7 2 1 8 9 2: two items would need nine tokens, and there are nine
    assert data.inputs.tolist() == [[[1, 5], [6, 7]], [[2, 1], [8, 9]]]
    assert data.targets.tolist() == [[[5, 6], [7, 2]], [[-100, 8], [9, 2]]]
    assert torch.equal(data[1]["labels"], data[1]["shift_labels"])
    one_mark = Documents([[5, 6, 7], [8, 9]], chunk=2, chunks_per_doc=2, bos=1, eos=1)
    assert one_mark.targets.tolist() == [[[5, 6], [7, 1]], [[-100, 8], [9, 1]]]  # eos counts, bos does not
    none = Documents([[5, 6, 7], [8, 9]], chunk=2, chunks_per_doc=2)
    assert len(none) == 1 and none.targets.tolist() == [[[6, 7], [8, 9]]]
    with pytest.raises(LcxError, match="has 5 tokens, one item needs 7"):
        Documents([[5, 6, 7], [8, 9]], chunk=3, chunks_per_doc=2)


def test_the_loss_is_that_of_every_next_token(tiny):
    model, data = model_of(tiny), rows(packs=2)
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].shape == (8, CHUNK)
    table = packs(4, constant(3))(0, 8)
    with torch.no_grad(), FocusedAttention((1,), CHUNK)(model):
        out = model(**batch, contexts=table)
    stream = torch.cat([data.inputs.flatten(), data.targets[-1, -1, -1:]])
    by_hand = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), stream[1:])
    assert out.loss.item() == pytest.approx(by_hand.item(), abs=1e-6)


# Trainer -----------------------------------------------------------------------------------------------------------


def test_every_micro_batch_gets_the_contexts_of_its_step(tiny, tmp_path):
    calls = []

    def contexts(step, entries):
        calls.append((step, entries))
        return packs(4, constant(3))(step, entries)

    model = model_of(tiny)
    with FocusedAttention((1,), CHUNK)(model):
        trainer_of(model, rows(12), tmp_path, contexts, gradient_accumulation_steps=2, max_steps=3).train()
    assert calls == [(0, 8), (0, 8), (1, 8), (1, 8), (2, 8), (2, 8)]


def test_without_a_memory_training_is_refused(tiny, tmp_path):
    trainer = trainer_of(model_of(tiny), rows(), tmp_path, packs(4, constant(3)))
    with pytest.raises(LcxError, match="inside `with FocusedAttention"):
        trainer.train()


def test_gradients_reach_what_is_remembered_with_and_without_checkpointing(tiny):
    """Loss on the last chunk alone: the words of the first chunk get a gradient through the memory, or not at all."""
    batch = collate([rows(1)[0]])
    batch["shift_labels"][:3] = -100
    # Word 5 stands at the start of the first chunk and nowhere else.
    batch["input_ids"][batch["input_ids"] == 5] = 6
    batch["input_ids"][0, 0] = 5
    found = {}
    for name, table, checkpointing in (
        ("memory", packs(4, constant(3))(0, 4), False),
        ("checkpointing", packs(4, constant(3))(0, 4), True),
        ("nothing", packs(4, constant(0))(0, 4), True),
    ):
        model = model_of(tiny).train()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untie
        if checkpointing:
            model.activation_checkpointing_enable()
        assert all(layer.gradient_checkpointing == checkpointing for layer in model.model.layers)
        with FocusedAttention((1, 2), CHUNK)(model):
            model(**batch, contexts=table).loss.backward()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
    of_word = {name: g["model.embed_tokens.weight"][5].norm().item() for name, g in found.items()}
    assert of_word["nothing"] == 0 and of_word["memory"] > 1e-6
    for name, g in found["memory"].items():
        torch.testing.assert_close(found["checkpointing"][name], g, rtol=1e-5, atol=1e-8)


def test_accumulated_gradients_are_those_of_the_micro_batches(tiny, tmp_path):
    model, data, kept, table = model_of(tiny), rows(4), Gradients(), packs(4, constant(3))
    targets = sum((data.targets != -100).flatten().tolist())
    with FocusedAttention((1,), CHUNK)(model):
        model.train()
        for pair in ((0, 1), (2, 3)):
            batch = collate([data[i] for i in pair])
            model(**batch, contexts=table(0, 8), num_items_in_batch=torch.tensor(targets)).loss.backward()
        by_hand = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        trainer = trainer_of(model, data, tmp_path, table, [kept], gradient_accumulation_steps=2, max_steps=1)
        trainer.train()
    for name, grad in kept.steps[0].items():
        torch.testing.assert_close(grad, by_hand[name], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_lora_trains_adapters_alone(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of(tiny)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    with FocusedAttention((1,), CHUNK)(wrapped):
        trainer = trainer_of(wrapped, rows(4), tmp_path, packs(4, constant(3)), max_steps=20)
        trainer.train()
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1


# lcx train focused -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_leaves_a_checkpoint_that_reads_a_memory(tiny, settings, tmp_path):
    state = torch.get_rng_state()
    settings = dataclasses.replace(settings, steps=15, learning_rate=1e-2)
    card = finetune(settings, tmp_path / "out", save_steps=5, command="lcx train focused …")
    assert torch.equal(torch.get_rng_state(), state)
    losses = [loss for _, loss in card["train_loss"]]
    assert len(losses) == 15 and losses[-1] < losses[0] - 1
    assert card == json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["steps"] == 15 and card["tokens"] == 15 * 2 * 4 * CHUNK
    assert {"command", "seed", "versions", "device", "date"} <= card["made_by"].keys()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"card.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu")
    focused = FocusedAttention.of(model)
    assert (focused.memory_layers, focused.window, focused.last_context) == ((1, 2), CHUNK, CHUNK // 2)
    assert focused.memory_positions and focused.dtype == torch.float32 and model.config.use_cache
    prompt = tokenizer("the Congress shall have power to lay " * 20, return_tensors="pt").input_ids
    with focused(model), torch.no_grad():
        loss = model(prompt, labels=prompt).loss.item()
        out = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with FocusedAttention((1, 2), CHUNK)(plain := model_of(tiny)), torch.no_grad():
        assert loss < plain(prompt, labels=prompt).loss.item() - 1
    assert out.shape[1] == prompt.shape[1] + 3


@pytest.mark.slow
def test_options_that_save_memory_change_nothing(settings, tmp_path):
    def trained(name, **changes):
        card = finetune(dataclasses.replace(settings, steps=3, **changes), tmp_path / name)
        return [loss for _, loss in card["train_loss"]], model_of(tmp_path / name).state_dict()

    losses, weights = trained("plain", gradient_accumulation=2)
    again, same = trained("checkpointing", gradient_accumulation=2, gradient_checkpointing=True)
    assert again == pytest.approx(losses, abs=1e-5)
    for name, w in weights.items():
        torch.testing.assert_close(same[name], w, rtol=0, atol=1e-5)
    assert trained("other", gradient_accumulation=2, seed=1)[0] != losses


@pytest.mark.slow
def test_lora_is_merged_into_a_plain_checkpoint(tiny, settings, tmp_path):
    pytest.importorskip("peft")
    card = finetune(
        dataclasses.replace(settings, lora_rank=2, steps=15, learning_rate=1e-2), tmp_path / "out"
    )
    assert 0 < card["trained_parameters"] < card["parameters"] // 10
    assert card["train_loss"][-1][1] < card["train_loss"][0][1] - 0.1
    before, after = model_of(tiny).state_dict(), model_of(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if "_proj" in n}


def test_a_finished_run_is_kept_and_another_is_refused(settings, tmp_path):
    out = tmp_path / "out"
    settings = dataclasses.replace(settings, steps=1)
    card = finetune(settings, out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert finetune(settings, out) == card and (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(LcxError, match=r"learning_rate 0.003, not 0.1: give another --out"):
        finetune(dataclasses.replace(settings, learning_rate=0.1), out)
    with pytest.raises(LcxError, match=r"holds files that are no training"):
        finetune(settings, lcx.zoo.folder("needle-64"))


@pytest.mark.slow
def test_interrupted_in_this_process_then_resumed(settings, tmp_path, monkeypatch):
    """Also: what failed before its first checkpoint does not hold the folder."""
    out = tmp_path / "out"
    with pytest.raises(LcxError, match="window 65 is outside 1 … 64"):
        finetune(dataclasses.replace(settings, window=65), out)
    settings = dataclasses.replace(settings, schedule="sampled", range="1,3")
    whole = finetune(settings, tmp_path / "whole")

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    compute_loss = CrossBatchTrainer.compute_loss
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(CrossBatchTrainer, "compute_loss", stop)
        finetune(settings, out, save_steps=2)
    (out / "checkpoints" / "checkpoint-5").mkdir()  # as a kill while saving leaves it
    with pytest.raises(LcxError, match="range 1,3, not 3"):
        finetune(dataclasses.replace(settings, schedule="sampled", range="3"), out)
    resumed = finetune(settings, out, save_steps=2)
    assert resumed["train_loss"] == whole["train_loss"] and resumed["seconds"] is None
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not (out / "checkpoints").exists()


def test_read_texts(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "and\u2028more", "id": 3}\r\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xff")
    assert read_texts([str(tmp_path)]) == ["first", "and\u2028more", "second"]
    assert read_texts([str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl")]) == [
        "second",
        "first",
        "and\u2028more",
    ]
    with pytest.raises(LcxError, match="not UTF-8"):
        read_texts([str(tmp_path / "ignored.bin")])
    (tmp_path / "c.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(LcxError, match='a field "text"'):
        read_texts([str(tmp_path / "c.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(LcxError, match="no text in it"):
        read_texts([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "no/such/file"], "no file or folder no/such/file"),
        (["--window", "65"], "window 65 is outside 1 … 64"),
        (["--memory-layers", "1,3"], "from 0 to 2"),
        (["--memory-layers", "first"], "give numbers from 0"),
        (["--chunks-per-doc", "1"], "no positives: use --chunks-per-doc 2"),
        (["--batch-size", "1"], "use --batch-size 2 or more"),
        (["--range", "0:1,5:3"], "use constant 3, stepped"),
        (["--schedule", "stepped", "--range", "5:3"], "must start at step 0"),
        (["--batch-size", "600"], "packs of 4 chunks, one step needs 600"),
        (["--chunks-per-doc", "2000"], "one item needs"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_options_are_one_clear_line(tiny, tmp_path, monkeypatch, capsys, options, words):
    base = ["lcx", "train", "focused", str(tiny), "--out", str(tmp_path / "out"), "--window", str(CHUNK)]
    data = [] if "--data" in options else ["--data", str(tiny / "text.txt")]
    monkeypatch.setattr(sys, "argv", [*base, *data, *options])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err, err


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    args = ["train", "focused", str(tiny), "--data", str(tiny / "text.txt"), "--out", str(tmp_path / "out")]
    args += ["--memory-layers", "2", "--window", "8", "--chunks-per-doc", "2", "--range", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["lcx", *args, "--batch-size", "1", "--schedule", "constant"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert capsys.readouterr().out.splitlines()[-1].endswith("at step 2, 32 tokens")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["made_by"]["command"].startswith(f"lcx train focused {tiny} --data ")
    assert card["settings"]["learning_rate"] == 2e-5 and card["tokens"] == 2 * 2 * 8
    assert FocusedAttention.of(model_of(tmp_path / "out")).memory_layers == (2,)
