"""Landmarks in ids and labels, and the token in tokenizer and embeddings."""

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

import lcx
from lcx.errors import LcxError, UnsupportedModelError
from lcx.landmark_tokens import add_landmark, encode, insert_landmarks, landmark_labels, remove_landmarks
from tests.fake_sources import tiny_llama, tiny_tokenizer

LANDMARK = 99


def test_a_landmark_closes_every_block():
    text = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    assert insert_landmarks(text, 4, LANDMARK).tolist() == [10, 11, 12, 99, 13, 14, 15, 99, 16]
    assert insert_landmarks(text[:6], 4, LANDMARK).tolist() == [10, 11, 12, 99, 13, 14, 15, 99]
    assert insert_landmarks(text[:2], 4, LANDMARK).tolist() == [10, 11]
    assert insert_landmarks(text[:2], 2, LANDMARK).tolist() == [10, 99, 11, 99]
    assert insert_landmarks(text[:0], 4, LANDMARK).tolist() == []


@pytest.mark.parametrize("block_size", [2, 3, 8, 51])
def test_counts_and_the_way_back(block_size):
    for length in range(120):
        ids = torch.arange(1000, 1000 + 2 * length).view(2, length)
        widened = insert_landmarks(ids, block_size, LANDMARK)
        assert widened.shape == (2, length + length // (block_size - 1))
        assert (widened == LANDMARK).sum() == 2 * (length // (block_size - 1))
        assert torch.equal(remove_landmarks(widened, block_size), ids)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_piece_by_piece_is_the_same_as_at_once(step):
    ids = torch.arange(1000, 1061)[None]
    pieces = [insert_landmarks(ids[:, i : i + step], 5, LANDMARK, start=i) for i in range(0, 61, step)]
    assert torch.equal(torch.cat(pieces, 1), insert_landmarks(ids, 5, LANDMARK))


def test_labels_of_both_conventions():
    text = torch.tensor([[10, 11, 12, 13, 14, 15, 16], [10, 11, -100, -100, -100, -100, 16]])
    none = landmark_labels(text, 4)
    assert none[0].tolist() == [11, 12, 13, -100, 14, 15, 16, -100, -100]
    assert none[1].tolist() == [11, -100, -100, -100, -100, -100, 16, -100, -100]
    at = landmark_labels(text, 4, loss_at_landmarks=True, landmark_id=LANDMARK)
    assert at[0].tolist() == [11, 12, 99, 13, 14, 15, 99, 16, -100]
    assert at[1].tolist() == [11, -100, -100, -100, -100, -100, -100, 16, -100]
    # Every token of the text but the first is predicted once, by either.
    for labels in (none, at):
        assert sorted(x for x in labels[0].tolist() if x not in (-100, LANDMARK)) == [*range(11, 17)]
    with pytest.raises(LcxError, match="needs landmark_id"):
        landmark_labels(text, 4, loss_at_landmarks=True)


def test_bad_input_to_insertion():
    ids = torch.tensor([1, 2, 99])
    with pytest.raises(LcxError, match="block_size 1 holds no token"):
        insert_landmarks(ids, 1, 5)
    with pytest.raises(LcxError, match="hold the landmark 99 already"):
        insert_landmarks(ids, 4, LANDMARK)
    with pytest.raises(LcxError, match="start -1"):
        insert_landmarks(ids, 4, 5, start=-1)


# Tokenizer and embeddings ------------------------------------------------------------------------------------------


def untied():
    config = LlamaConfig.from_dict(tiny_llama().config.to_dict() | {"tie_word_embeddings": False})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config)


def rows(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("model", [tiny_llama, untied], ids=["tied", "untied"])
@pytest.mark.parametrize("pad", [False, True])
def test_new_rows_are_the_mean_of_the_old(model, pad):
    model, tokenizer = model(), tiny_tokenizer()
    if pad:
        tokenizer.pad_token = None
    before = [w.detach().clone() for w in rows(model)]
    state = torch.get_rng_state()
    landmark = add_landmark(model, tokenizer, pad=pad)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        landmark == 300 + pad == model.config.mem_id
        and len(tokenizer) == model.config.vocab_size == landmark + 1
    )
    assert tokenizer("a<landmark>").input_ids[-1] == landmark
    assert tokenizer.decode([landmark, 67], skip_special_tokens=True) == "a"
    if pad:
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 300)
    for new, old in zip(rows(model), before, strict=True):
        assert torch.equal(new[:300], old)
        torch.testing.assert_close(new[300:], old.mean(0).expand(1 + pad, -1))
    tied = rows(model)[0] is rows(model)[1]
    assert tied == model.config.tie_word_embeddings
    assert model(torch.tensor([[5, landmark]])).logits.shape == (1, 2, landmark + 1)


def test_again_changes_nothing_nor_after_saving(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    landmark = add_landmark(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[landmark] = 7.0  # as training leaves it
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    for pair in ((model, tokenizer), lcx.load(tmp_path, device="cpu", dtype=torch.float32)):
        assert add_landmark(*pair) == landmark == pair[0].config.mem_id
        assert len(pair[1]) == pair[0].config.vocab_size == 301
        assert torch.equal(pair[0].get_input_embeddings().weight[landmark], torch.full((64,), 7.0))


def test_a_spare_row_is_used_and_is_no_part_of_the_mean():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        model.resize_token_embeddings(320, mean_resizing=False)
        model.get_input_embeddings().weight[300:] = 1000.0
    assert add_landmark(model, tokenizer) == 300 and model.config.vocab_size == 320
    w = model.get_input_embeddings().weight
    torch.testing.assert_close(w[300], w[:300].mean(0))
    assert (w[301:] == 1000).all()


def test_a_tokenizer_that_has_the_token_gives_a_plain_model_its_row():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    add_landmark(tiny_llama(), tokenizer)
    assert add_landmark(model, tokenizer) == 300 and model.config.vocab_size == 301
    w = model.get_input_embeddings().weight
    torch.testing.assert_close(w[300], w[:300].mean(0))


def test_what_does_not_belong_together_is_refused():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(LcxError, match="ids up to 300 and the model 300 rows"):
        add_landmark(model, tokenizer)
    with pytest.raises(LcxError, match="'a' is a word of this tokenizer"):
        add_landmark(model, tiny_tokenizer(), token="a")
    model.config.mem_id = 250
    untouched = tiny_tokenizer()
    with pytest.raises(LcxError, match="landmark is token 250 and this tokenizer has no '<landmark>' there"):
        add_landmark(model, untouched)
    assert len(untouched) == 300
    with pytest.raises(UnsupportedModelError):
        add_landmark(torch.nn.Linear(2, 2), untouched)


def test_a_typed_landmark_is_text():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    landmark = add_landmark(model, tokenizer)
    typed = "see <landmark> here"
    assert landmark in tokenizer(typed).input_ids
    ids = encode(tokenizer, typed, landmark)
    assert landmark not in ids and tokenizer.decode(ids) == typed
    assert landmark in tokenizer(typed).input_ids  # no setting is left behind
    assert encode(tokenizer, "no mark", landmark) == tokenizer("no mark").input_ids
    stubborn = tiny_tokenizer()
    stubborn.add_tokens([AddedToken("<landmark>", special=False)])
    with pytest.raises(LcxError, match="take it out"):
        encode(stubborn, typed, 300)
