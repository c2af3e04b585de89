"""What the Focused Transformer promises beyond the matrix: the invariants of its specification, on every family."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import lcx
from lcx import FocusedAttention
from lcx.errors import LcxError, UnsupportedModelError

from .conftest import LENGTH, VOCAB, logits, tiny_model, tokens
from .reference import reference_windows

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
WINDOW = 8
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def chunks_of_one_document(ids, window=WINDOW):
    """Rows and contexts in which every chunk sees all chunks before it."""
    rows = ids.view(-1, window)
    return rows, lcx.crossbatch_contexts([(c, 0) for c in range(len(rows))], len(rows))


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)], ids=str)
def test_agrees_with_the_float64_definition(model, layers):
    ids = tokens(length=21)
    with FocusedAttention(layers, window=WINDOW)(model):
        got = logits(model, ids)[0]
    # 21 tokens with a last context of 8: the prompt's first 13 tokens go in as windows of 8 and 5.
    memory = {i: [] for i in layers}
    from .reference import reference_logits

    wanted = torch.cat([reference_logits(model, part, memory=memory) for part in ids[0].split((8, 5, 8))])
    assert_close(got.double(), wanted, **TOLERANCE)


def test_definition_of_the_windows_is_the_one_of_the_specification(model):
    ids = tokens()
    with FocusedAttention((1,), window=WINDOW)(model):
        assert_close(
            logits(model, ids)[0].double(), reference_windows(model, ids[0], WINDOW, (1,)), **TOLERANCE
        )


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("foreign", [False, True], ids=["one document", "another document first"])
def test_crossbatch_is_windowed_inference(family, dtype, foreign):
    model = tiny_model(family).to(dtype)
    ids = tokens(seed=1)
    if foreign:  # a negative is what another document earlier in the stream is
        ids = torch.cat([tokens(length=2 * WINDOW, seed=2), ids], 1)
    rows, contexts = chunks_of_one_document(ids)
    with FocusedAttention((0, 1), window=WINDOW)(model), torch.no_grad():
        trained = model(rows, contexts=contexts).logits.flatten(0, 1)
        streamed = model(ids).logits[0]
    assert (trained - streamed).norm() <= EXACT[dtype] * streamed.norm()


def test_all_windows_at_once_is_one_by_one(family):
    """Training and inference of one long row go different ways and must agree, with unequal rows as well."""
    model, ids = tiny_model(family).double(), tokens(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with FocusedAttention((1,), window=WINDOW, last_context=6)(model):
        trained = model(ids, attention_mask=mask, labels=ids, use_cache=False).logits
        streamed = logits(model, ids, attention_mask=mask)
    keep = mask.bool()
    assert trained.requires_grad
    assert_close(trained[keep].detach(), streamed[keep], atol=1e-11, rtol=1e-10)


def test_gradients_reach_the_first_window_through_the_memory(family):
    model, ids = tiny_model(family), tokens()
    for layers, reaches in [((1,), True), ((), False)]:
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        with FocusedAttention(layers, window=WINDOW)(model):
            rows, contexts = chunks_of_one_document(ids)
            parts = embeds.view(-1, WINDOW, embeds.shape[-1])
            model(inputs_embeds=parts, contexts=contexts).logits[-1].pow(2).sum().backward()
        first = embeds.grad[0, :WINDOW].abs().max()
        assert (first > 1e-4) if reaches else (first == 0)


def test_no_entry_sees_its_own_future(family):
    model = tiny_model(family)
    rows = tokens(rows=8, length=WINDOW, seed=3)
    contexts = lcx.crossbatch_contexts([(0, 2), (1, 2), (2, 2), (3, 1)], 8)
    embeds = model.model.embed_tokens(rows).detach().requires_grad_()
    with FocusedAttention((0, 1), window=WINDOW)(model):
        out = model(inputs_embeds=embeds, contexts=contexts).logits
    for entry in (0, 2, 4, 5, 7):
        grad = torch.autograd.grad(out[entry].pow(2).sum(), embeds, retain_graph=True)[0].abs().amax((1, 2))
        assert (grad[entry + 1 :] == 0).all() and grad[entry] > 0
        assert all(grad[c] > 1e-6 for c in contexts[entry].tolist() if c >= 0)


def test_trap_looking_around_the_end_of_the_batch_leaks_through_the_second_memory_layer():
    """Negatives from the end of the batch are other documents, yet they have seen the entry's own future."""
    model, rows = tiny_model("llama"), tokens(rows=4, length=WINDOW, seed=3)
    # Two documents of two chunks. Entry 0 looks around at entry 3 of the other document, which has seen entry 1.
    around = torch.tensor([[3, -1], [0, 3], [1, -1], [2, 1]])
    for layers, leaks in [((1,), False), ((0, 1), True)]:
        embeds = model.model.embed_tokens(rows).detach().requires_grad_()
        with FocusedAttention(layers, window=WINDOW)(model):
            out = model(inputs_embeds=embeds, contexts=around).logits
        own_future = torch.autograd.grad(out[0].pow(2).sum(), embeds)[0][1]
        assert bool(own_future.abs().max() > 0) == leaks


def test_memory_holds_the_unrotated_keys_of_all_but_the_last_context(model):
    ids, seen = tokens(), {}
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: seen.update(k=out))
    with FocusedAttention((1,), window=WINDOW)(model) as focused:
        state = focused.remember(ids[:, :WINDOW])
    hook.remove()
    assert len(state.memory) == WINDOW and state.get_seq_length() == 0
    k = seen["k"].view(1, WINDOW, -1, model.config.head_dim)
    attention = model.model.layers[1].self_attn
    k = (attention.k_norm(k) if hasattr(attention, "k_norm") else k).transpose(1, 2)
    q = torch.randn(1, 4, 3, model.config.head_dim, generator=torch.Generator().manual_seed(0))
    scores = q @ k.repeat_interleave(2, 1).mT
    assert_close(state.memory.attend(1, q, 1.0)[1], scores.logsumexp(-1), **TOLERANCE)


def test_use_cache_or_not_gives_the_same_logits(model):
    ids = tokens()
    with FocusedAttention((1,), window=WINDOW)(model), torch.no_grad():
        on, off = model(ids, use_cache=True), model(ids, use_cache=False)
    assert torch.equal(on.logits, off.logits) and off.past_key_values is None
    assert len(on.past_key_values.memory) == LENGTH - WINDOW


@pytest.mark.parametrize("overflow", ["flush", "roll"])
def test_overflow_while_decoding(model, overflow):
    ids = tokens(length=20)
    with FocusedAttention((1,), window=WINDOW, overflow=overflow)(model):
        cache = DynamicCache()
        for t in range(20):
            logits(model, ids[:, t : t + 1], past_key_values=cache)
            local = int(cache.mask.sum())
            assert local + len(cache.memory) == t + 1, "no token is lost and none is kept twice"
            assert local == (t % WINDOW + 1 if overflow == "flush" else min(t + 1, WINDOW))
            assert cache.get_seq_length() == t + 1


def test_rolling_keeps_a_full_window_in_every_layer(family):
    """Without memory layers' help: a one-layer-memory model whose memory is masked sees exactly the last 8 tokens."""
    model, ids = tiny_model(family), tokens(length=12)
    with FocusedAttention((1,), window=WINDOW, overflow="roll", max_tokens=10**6)(model):
        cache = DynamicCache()
        parts = [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(12)]
    memory = {1: []}
    from .reference import reference_logits

    # By definition: layer 1 sees memory (tokens 0 … 3, keys made in the windows they were new in) and window, layer 0 the window.
    # The first 8 tokens are an ordinary window.
    wanted = reference_logits(model, ids[0, :WINDOW], memory=memory)
    assert_close(torch.cat(parts, 1)[0, :WINDOW].double(), wanted, **TOLERANCE)
    assert int(cache.mask.sum()) == WINDOW and len(cache.memory) == 4


def test_rows_that_overflow_at_different_times_decode_as_they_do_alone(model):
    lengths = (LENGTH, 5, 13)
    rows = [tokens(length=n, seed=i) for i, n in enumerate(lengths)]
    ids, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, LENGTH - row.shape[1] :], mask[i, LENGTH - row.shape[1] :] = row[0], 1
    with FocusedAttention((1,), window=WINDOW, last_context=6)(model):
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)[:, LENGTH:]
        for i, row in enumerate(rows):
            alone = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=14, do_sample=False
            )
            assert batch[i].tolist() == alone[0, row.shape[1] :].tolist()


def test_a_prepared_memory_answers_many_questions_and_stays_as_it_is(model, tmp_path):
    document, questions = tokens(length=29), tokens(rows=3, length=5, seed=7)
    with FocusedAttention((1,), window=WINDOW)(model) as focused:
        state = focused.remember(document)
        first = logits(model, questions[:1], past_key_values=state.fork())
        again = logits(model, questions[:1], past_key_values=state.fork())
        assert torch.equal(first, again) and len(state.memory) == 29 and state.mask is None
        batch = logits(model, questions, past_key_values=state.fork())
        assert_close(batch[:1], first, **TOLERANCE)  # one row of memory, many questions
        # The same tokens in one input give the same, when windows fall in the same places.
        whole = torch.cat([document[:, :24], questions[:1]], 1)
        state24 = focused.remember(document[:, :24])
        joined = logits(model, questions[:1], past_key_values=state24.fork())
        answer = model.generate(questions, past_key_values=state.fork(), max_new_tokens=12, do_sample=False)
        assert answer.shape == (3, 17) and len(state.memory) == 29
        more = focused.remember(questions[:1], state=state.fork())
        assert len(more.memory) == 34 and len(state.memory) == 29
        path = focused.save(state, tmp_path / "memory.safetensors")
        loaded = focused.load(path)
        assert torch.equal(logits(model, questions[:1], past_key_values=loaded), first)
        with pytest.raises(LcxError, match="already inside"), FocusedAttention((1,), window=WINDOW)(model):
            pass
    with FocusedAttention((1,), window=WINDOW, last_context=5)(model):
        assert_close(joined, logits(model, whole)[:, -5:], **TOLERANCE)
    other = tiny_model("llama", hidden_size=64)
    with FocusedAttention((1,), window=WINDOW)(other) as focused, pytest.raises(LcxError, match="model"):
        focused.load(path)


def test_a_conversation_goes_on_with_its_cache(model):
    ids = tokens(length=10)
    with FocusedAttention((1,), window=WINDOW)(model) as focused:
        cache = focused.new_cache()
        one = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        more = torch.cat([one, tokens(length=3, seed=9)], 1)
        two = model.generate(more, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert two.shape[1] == 20 and cache.get_seq_length() == 19


def test_beams_and_sampling(model):
    ids = tokens(rows=2, length=20)
    with FocusedAttention((1,), window=WINDOW)(model):
        out = model.generate(ids, num_beams=3, max_new_tokens=10, do_sample=False)
        alone = model.generate(ids[1:], num_beams=3, max_new_tokens=10, do_sample=False)
        assert out[1].tolist() == alone[0].tolist()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sampled = model.generate(ids, do_sample=True, max_new_tokens=10, num_return_sequences=2)
        assert sampled.shape == (4, 30)


def test_top_k_of_the_whole_memory_is_dense(model):
    ids = tokens()
    with FocusedAttention((1,), window=WINDOW)(model):
        dense = logits(model, ids)
    for k, equal in ((LENGTH, True), (1, False)):
        with FocusedAttention((1,), window=WINDOW, top_k=k)(model):
            difference = (logits(model, ids) - dense).abs().max()
        assert (difference < 1e-4) if equal else (difference > 1e-3)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_tiers_give_the_same_logits(model, tier, tmp_path):
    ids = tokens()
    with FocusedAttention((1,), window=WINDOW)(model):
        wanted = logits(model, ids)
    with FocusedAttention((1,), window=WINDOW, tier=tier, folder=tmp_path if tier == "disk" else None)(model):
        assert_close(logits(model, ids), wanted, **TOLERANCE)


def test_only_the_logits_asked_for_are_computed(model):
    ids, widths, calls = tokens(rows=2), [], []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda m, x: widths.append(x[0].shape[1])),
        model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1)),
    ]
    with FocusedAttention((0,), window=WINDOW)(model):
        every, last = logits(model, ids), logits(model, ids, logits_to_keep=2)
        some = logits(model, ids, logits_to_keep=torch.tensor([3, 20]))
        calls.clear()
        logits(model, ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    assert widths == [LENGTH, 2, 2, 1]
    assert_close(last, every[:, -2:], **TOLERANCE)
    assert_close(some, every[:, [3, 20]], **TOLERANCE)
    assert len(calls) == 1, (
        "windows of which only keys and values are wanted leave the model in the last memory layer"
    )


def test_without_positions_and_other_layers_a_memory_is_full_attention():
    """One layer, no positions anywhere in it: an unordered memory is all there is to know about the past."""
    model, ids = tiny_model("llama", num_hidden_layers=1), tokens()
    with FocusedAttention((0,), window=LENGTH, memory_positions=False)(model):
        full = logits(model, ids)
    with FocusedAttention((0,), window=WINDOW, memory_positions=False)(model):
        assert_close(logits(model, ids), full, **TOLERANCE)
    with FocusedAttention((0,), window=WINDOW)(model), pytest.raises(AssertionError):
        assert_close(logits(model, ids), logits(tiny_model("llama", num_hidden_layers=1), ids), **TOLERANCE)


def test_an_untrained_model_spreads_its_attention_evenly():
    model = tiny_model("llama")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(0.1)  # as at initialisation: scores near 0
    rows = tokens(rows=32, length=WINDOW)
    with (
        FocusedAttention((1,), window=WINDOW)(model) as focused,
        focused.recording() as masses,
        torch.no_grad(),
    ):
        for d in (1, 4, 16):
            model(rows, contexts=lcx.lane_contexts(16, d))
            share = lcx.positive_share(masses[1][16:]).mean()
            assert share == pytest.approx(1 / d, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"memory_layers": (2,)}, "layers"),
        ({"memory_layers": (-1,)}, "layers"),
        ({"memory_layers": (1, 1)}, "different"),
        ({"memory_layers": (1,), "window": 257}, "window"),
        ({"memory_layers": (1,), "window": 0}, "window"),
        ({"memory_layers": (1,), "window": 8, "last_context": 9}, "last_context"),
        ({"memory_layers": (1,), "overflow": "drop"}, "overflow"),
        ({"memory_layers": (1,), "lookup": "faiss"}, "top_k"),
        ({"memory_layers": (1,), "tier": "cloud"}, "tier"),
    ],
)
def test_bad_settings_give_one_line_before_anything_runs(settings, word):
    model = tiny_model("llama")
    with pytest.raises(LcxError, match=word) as e, FocusedAttention(**settings)(model):
        pass
    assert "\n" not in str(e.value)
    assert "forward" not in vars(model)


def test_bad_input_gives_one_line(model):
    with FocusedAttention((), window=WINDOW)(model):
        assert logits(model, tokens(length=WINDOW)).shape == (1, WINDOW, VOCAB)
        with pytest.raises(LcxError, match="forgotten"):
            logits(model, tokens())
    with FocusedAttention((1,), window=WINDOW)(model) as focused:
        with pytest.raises(LcxError, match="attention_mask"):
            model(tokens(), attention_mask=torch.ones(2, LENGTH))
        with pytest.raises(LcxError, match="rows"):
            logits(model, tokens(rows=2, length=2), past_key_values=model(tokens(length=3)).past_key_values)
        with pytest.raises(LcxError, match="memory of"):
            logits(model, tokens(rows=3, length=2), past_key_values=focused.remember(tokens(rows=2)))
        with pytest.raises(LcxError, match="attentions"):
            model(tokens(), output_attentions=True)
        with pytest.raises(LcxError, match="model itself"):
            model.model(tokens())
        with pytest.raises(LcxError, match="contexts"):
            model(tokens(rows=2, length=WINDOW), contexts=torch.tensor([[5], [0]]))
        full = DynamicCache()
        full.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
        with pytest.raises(LcxError, match="past_key_values"):
            logits(model, tokens(length=2), past_key_values=full)
    with pytest.raises(LcxError, match="sliding"):
        with FocusedAttention((1,), window=100)(tiny_model("mistral", sliding_window=128)):
            pass
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    with pytest.raises(UnsupportedModelError, match="Llama, Mistral, Qwen2, Qwen3"):
        with FocusedAttention((0,))(gpt2):
            pass
