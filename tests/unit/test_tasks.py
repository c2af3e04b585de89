"""Retrieval tasks: exact lengths, the needle where it was asked for, the same tokens for the same seed, controls."""

import pytest

from lcx.errors import LcxError
from lcx.tasks import key_value, lines, needle_grid, passkey
from lcx.tasks.sample import FILLER, encode, question_and_answer, sentence_end

PROSE = (
    "The ships came in at dawn. Nobody on the quay could say where they had been, and nobody asked. In 1807 the old "
    "harbour master had counted 57 of them; this morning there were more. Snow fell on the nets! Was it an omen? "
)


def make_tokenizer(bos: bool = False, vocab: int = 420):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    tok.train_from_iterator(
        [PROSE, FILLER] * 3,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tokenizer(request):
    return make_tokenizer(request.param)


TASKS = [
    pytest.param(passkey.sample, {"haystack": "filler"}, id="passkey-filler"),
    pytest.param(passkey.sample, {"haystack": PROSE}, id="passkey-text"),
    pytest.param(needle_grid.sample, {"haystack": PROSE, "distractors": 3}, id="needle-grid"),
    pytest.param(key_value.sample, {}, id="key-value"),
    pytest.param(lines.sample, {}, id="lines"),
]


@pytest.mark.parametrize("sample, options", TASKS)
@pytest.mark.parametrize("length", [700, 701, 1024, 1500])
def test_length_is_exact_with_and_without_the_needle(tokenizer, sample, options, length):
    for depth in (0, 0.3, 1):
        for ablate in (False, True):
            s = sample(tokenizer, length=length, depth=depth, seed=3, ablate=ablate, **options)
            assert s.length == len(s.input_ids) == length
            assert s.prompt_ids + s.answer_ids == s.input_ids
            assert tokenizer.decode(s.answer_ids).strip(' "<') == s.answer


@pytest.mark.parametrize("sample, options", TASKS)
def test_tokens_are_those_of_the_joined_text(tokenizer, sample, options):
    s = sample(tokenizer, length=900, depth=0.5, seed=1, **options)
    prompt = list(s.prompt_ids)
    if prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[1:]
    assert encode(tokenizer, tokenizer.decode(prompt)) == prompt


@pytest.mark.parametrize("sample, options", TASKS)
def test_the_seed_decides_everything(tokenizer, sample, options):
    a = sample(tokenizer, length=800, depth=0.4, seed=5, **options)
    assert a == sample(tokenizer, length=800, depth=0.4, seed=5, **options)
    answers = {sample(tokenizer, length=800, depth=0.4, seed=s, **options).answer for s in range(20)}
    assert len(answers) == 20


@pytest.mark.parametrize("sample, options", TASKS)
def test_needle_span_holds_the_answer_and_only_it_does(tokenizer, sample, options):
    for seed in range(5):
        s = sample(tokenizer, length=900, depth=0.6, seed=seed, **options)
        start, stop = s.needle
        assert s.answer in tokenizer.decode(s.input_ids[start:stop])
        rest = tokenizer.decode(s.prompt_ids[:start] + s.prompt_ids[stop:])
        assert s.answer not in rest
        gone = sample(tokenizer, length=900, depth=0.6, seed=seed, ablate=True, **options)
        assert gone.answer == s.answer and gone.needle[0] == gone.needle[1]
        assert s.answer not in tokenizer.decode(gone.prompt_ids)


def test_needle_stands_at_the_end_of_a_sentence_near_its_depth(tokenizer):
    for depth in (0, 0.25, 0.5, 0.75, 1):
        s = passkey.sample(tokenizer, length=1200, depth=depth, seed=2, haystack=PROSE)
        assert abs(s.depth - depth) < 0.05
        if depth < 1:
            assert tokenizer.decode(s.prompt_ids[: s.needle[0]]).rstrip().endswith((".", "?", "!"))


def test_sentence_end_takes_the_nearest(tokenizer):
    ids = encode(tokenizer, " One two three. Four five six. Seven eight nine.")
    ends = [i + 1 for i, t in enumerate(ids) if tokenizer.decode([t]).rstrip().endswith(".")]
    at = sentence_end(tokenizer, ids, ends[1] / len(ids))
    assert at == ends[1]
    assert sentence_end(tokenizer, ids, 0) == 0 and sentence_end(tokenizer, ids, 1) == len(ids)


def test_answer_starts_with_a_digit_where_the_space_is_a_token(tokenizer):
    question, answer = question_and_answer(tokenizer, "The pass key is ", "57427")
    assert tokenizer.decode(answer) == "57427" and len(answer) == 5
    assert tokenizer.decode(question).endswith("is ")


def test_key_value_is_json_with_distinct_entries(tokenizer):
    import json

    s = key_value.sample(tokenizer, pairs=40, depth=0.5, seed=4)
    text = tokenizer.decode(s.prompt_ids, skip_special_tokens=True)
    held = json.loads(text[text.index("{") : text.index("}") + 1])
    assert len(held) == len(set(held.values())) == 40
    asked = text.rsplit('key "', 1)[1].split('"')[0]
    assert held[asked] == s.answer and list(held).index(asked) == round(0.5 * 39)


@pytest.mark.parametrize("depth, index", [(0, 0), (0.5, 4), (1, 9)])
def test_lines_ask_for_the_chosen_line(tokenizer, depth, index):
    s = lines.sample(tokenizer, count=10, depth=depth, seed=4)
    text = tokenizer.decode(s.prompt_ids)
    rows = [row for row in text.split("\n") if row.startswith("line ")]
    assert len(rows) == 10 and f"<{s.answer}>" in rows[index]
    assert rows[index].split(":")[0].removeprefix("line ") in text.rsplit("in line ", 1)[1]


def test_needle_grid_asks_for_the_first_of_its_safes(tokenizer):
    s = needle_grid.sample(tokenizer, length=900, depth=0.5, seed=1, distractors=4, haystack=PROSE)
    text = tokenizer.decode(s.prompt_ids)
    assert text.count("opens with the number") == 6  # five needles and the question
    asked = text.rsplit("opens the ", 1)[1].split("?")[0]
    assert f"The {asked} opens with the number {s.answer}." in text


def test_bad_input_says_what_to_do(tokenizer):
    with pytest.raises(LcxError, match="needs at least"):
        passkey.sample(tokenizer, length=20)
    with pytest.raises(LcxError, match="between 0"):
        passkey.sample(tokenizer, length=500, depth=1.5)
    with pytest.raises(LcxError, match="either length"):
        lines.sample(tokenizer, length=500, count=3)
    with pytest.raises(LcxError, match="either length"):
        key_value.sample(tokenizer)
    with pytest.raises(LcxError, match="ask for more tokens"):
        key_value.sample(tokenizer, length=30)
    with pytest.raises(LcxError, match="empty haystack"):
        passkey.sample(tokenizer, length=500, haystack="  ")


def test_nothing_touches_the_global_generator(tokenizer):
    import random

    random.seed(0)
    before = random.getstate()
    for param in TASKS:
        param.values[0](tokenizer, length=700, seed=1, **param.values[1])
    assert random.getstate() == before
