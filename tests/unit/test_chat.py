"""Conversations: what of them is the assistant's, how they are joined into rows, and training on them."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

import lcx
from lcx import cli
from lcx.chat import encode_chat
from lcx.errors import LcxError
from lcx.finetune import finetune, read_texts
from lcx.finetune_cream import CreamSettings, PositionLabels, Rows, joined
from tests.unit.test_train import make_tiny, quiet_cpu  # noqa: F401

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% GEN %}{{ m['content'] + '<|im_end|>\n' }}{% END %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{% GEN %}", "").replace("{% END %}", "")
MARKED = CHATML.replace(
    "{% GEN %}{{ m['content'] + '<|im_end|>\n' }}{% END %}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


TALK = chat(
    "What is the state of the union?", "It is strong.", "Why is that?", "Because of the people, ¼ of them."
)


@pytest.fixture
def tokenizer():
    made = AutoTokenizer.from_pretrained(lcx.zoo.folder("lm-256"))
    made.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def said(tokenizer, messages):
    """What is marked as the assistant's, a text for each stretch of it; and all text."""
    ids, wanted = encode_chat(tokenizer, messages)
    assert len(ids) == len(wanted) and set(wanted) <= {0, 1}
    stretches, before = [], 0
    for token, one in zip(ids, wanted, strict=True):
        if one and not before:
            stretches.append([])
        if one:
            stretches[-1].append(token)
        before = one
    return [tokenizer.decode(s) for s in stretches], tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "form"),
    [(LLAMA_2, " {} <|endoftext|>"), (PLAIN, "{}<|im_end|>\n"), (MARKED, "{}<|im_end|>\n")],
    ids=["llama 2", "chatml", "chatml with generation"],
)
def test_what_the_assistant_says_and_the_end_of_its_turn(tokenizer, template, form):
    tokenizer.chat_template = template
    spoken, whole = said(tokenizer, TALK)
    assert spoken == [form.format(m["content"]) for m in TALK if m["role"] == "assistant"]
    assert whole == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert said(tokenizer, TALK[:1])[0] == []


def test_prefixes_and_generation_marks_agree(tokenizer):
    tokenizer.chat_template = PLAIN
    by_prefixes = encode_chat(tokenizer, TALK)
    tokenizer.chat_template = MARKED
    assert encode_chat(tokenizer, TALK) == by_prefixes


def test_conversations_are_joined_into_rows_with_prompts_out_of_the_loss(tokenizer):
    tokenizer.chat_template = PLAIN
    texts = [TALK, "the union", chat("Who?", "We.")]
    parts = [encode_chat(tokenizer, TALK), None, encode_chat(tokenizer, texts[2])]
    mark, ids = tokenizer.bos_token_id, tokenizer("the union").input_ids
    parts[1] = [mark, *ids, mark], [0, *(1 for _ in ids), 1]  # a document, as in Documents
    stream, wanted = (sum(part, []) for part in zip(*parts, strict=True))
    data = joined(tokenizer, texts, 8)
    rows = [
        (stream[i : i + 8], stream[i + 1 : i + 9], wanted[i + 1 : i + 9])
        for i in range(0, len(stream) - 8, 8)
    ]
    kept = [row for row in rows if any(row[2])]
    assert 0 < len(kept) < len(rows)  # a row of a long prompt has nothing to learn
    assert data.inputs[:, 0].tolist() == [row[0] for row in kept]
    assert data.targets[:, 0].tolist() == [
        [t if w else -100 for t, w in zip(row[1], row[2], strict=True)] for row in kept
    ]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, TALK, "has no chat template"),
        (
            LLAMA_2,
            [{"role": "system", "content": "Be brief."}, *TALK],
            "begins 'system: Be brief.': only user and",
        ),
        (FORGETFUL, TALK, "writes earlier turns anew in a conversation that begins 'user: What is"),
        (
            PLAIN,
            chat("Hello.", "Hi.", first="assistant"),
            "refuses a conversation that begins 'assistant: Hello.'",
        ),
    ],
    ids=["no template", "unknown role", "forgets", "begins with an answer"],
)
def test_conversations_that_have_no_form_are_one_clear_line(tokenizer, template, messages, words):
    tokenizer.chat_template = template
    with pytest.raises(LcxError) as e:
        encode_chat(tokenizer, messages)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_one_answer_is_enough_for_a_template_that_forgets(tokenizer):
    tokenizer.chat_template = FORGETFUL
    assert said(tokenizer, TALK[:2])[0] == ["assistant: It is strong."]


def test_questions_alone_are_refused(tokenizer):
    tokenizer.chat_template = PLAIN
    with pytest.raises(LcxError, match="no message in the data is the assistant's"):
        joined(tokenizer, [TALK[:1]] * 9, 8)


@pytest.mark.parametrize(
    "line",
    [{"messages": []}, {"messages": "hello"}, {"messages": [{"role": "user"}]}, {"messages": [{"role": 1, "content": "a"}]}, {"chat": []}],
    ids=str,
)  # fmt: skip
def test_lines_that_are_no_conversation_are_refused(tmp_path, line):
    (tmp_path / "chat.jsonl").write_text(json.dumps(line))
    with pytest.raises(LcxError, match='field "text", or "messages" with role and content'):
        read_texts([str(tmp_path / "chat.jsonl")])


# Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A tiny chat model and 60 conversations, chat.jsonl."""
    folder = make_tiny(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA_2
    tokenizer.save_pretrained(folder)
    lines = [
        {"messages": chat(f"What of {i}?", f"It is {i * i} and strong.", "Why?", "So it is.")}
        for i in range(60)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_loss_is_that_of_the_answers(tiny, tmp_path):
    settings = CreamSettings(str(tiny), (str(tiny / "chat.jsonl"),), steps=1, batch_size=2, factor=4)
    card = finetune(dataclasses.replace(settings, scaling="none", sampler="pose"), tmp_path / "out")
    model, tokenizer = lcx.load(tiny, device="cpu", dtype=torch.float32)
    data = Rows(joined(tokenizer, read_texts(settings.data), 64), 2, 1, 0)
    batch = PositionLabels(dataclasses.replace(settings, sampler="pose").labels(64), 0)([data[0], data[1]])
    targets = batch["shift_labels"].flatten()
    given = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**given).logits.flatten(0, 1)
    wanted = targets >= 0
    assert 20 < wanted.sum() < 100
    by_hand = torch.nn.functional.cross_entropy(logits[wanted], targets[wanted]).item()
    assert card["train_loss"] == [[1, pytest.approx(by_hand, abs=1e-4)]]
    assert tokenizer.decode(batch["input_ids"].flatten()[wanted]).count("strong") > 1
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == LLAMA_2


@pytest.mark.parametrize(
    ("method", "words"),
    [("landmark", "conversations are for lcx train cream"), ("cream", "has no chat template")],
)
def test_what_cannot_learn_from_conversations_says_so(tiny, tmp_path, monkeypatch, capsys, method, words):
    (tiny / "chat_template.jinja").unlink()
    args = [
        "lcx",
        "train",
        method,
        str(tiny),
        "--data",
        str(tiny / "chat.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", args if method == "landmark" else [*args, "--factor", "2"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
