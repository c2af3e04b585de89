"""The measurements of chapter 6 count what is asked, and do not measure twice what they have."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lcx import zoo
from lcx.measure import dictionary, needle_memory


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**zoo.recipe("needle-memory").config)).eval()


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path))
    monkeypatch.setattr(needle_memory, "QUESTIONS", 4)
    monkeypatch.setattr(needle_memory, "DOCUMENTS", (1, 8))


@pytest.mark.parametrize(
    ("make", "answer", "answers"), [(needle_memory.needles, 12, 12), (dictionary.definitions, 4, 24)]
)
def test_recall_counts_tokens_and_whole_answers(model, make, answer, answers):
    """A model that always says token 20 is right where 20 is the answer, and never for a whole answer of several."""
    model.lm_head.weight.data.zero_()
    for documents in (1, 8):
        seen = []

        def noted(*args, seen=seen):
            seen.append(make(*args))
            return seen[-1]

        model.lm_head.register_forward_hook(lambda m, x, out: out.index_fill(-1, torch.tensor([20]), 1.0))
        figures = needle_memory.recall(model, documents, noted, answer)
        assert len(seen) == (4 if documents == 1 else 1)  # small memories are made several times
        assert (figures["answers"], figures["scored"]) == (answers, answer * answers)
        chosen = slice(None) if documents == 1 else [0, 2, 5, 7]
        targets = torch.cat([labels[chosen, 1] for _, labels in seen])
        share = (targets == 20).sum() / (targets >= 0).sum()
        assert figures["accuracy"] == pytest.approx(share.item()) and figures["whole"] == 0
        assert figures["memory_bytes"] == documents * 64 * 2 * 64 * 4


def test_finished_rows_are_kept(model, monkeypatch, capsys):
    monkeypatch.setattr(needle_memory, "trained", lambda name, seed: model)
    first = needle_memory.by_size("needle-memory", [("a", 0)])
    assert [(r["documents"], r["top_k"]) for r in first["rows"]] == [(1, None), (1, 32), (8, None), (8, 32)]
    monkeypatch.setattr(needle_memory, "trained", None)
    again = needle_memory.by_size("needle-memory", [("a", 0)])
    assert again == first and again["peak_mib"] > 0 and "peak_mib" not in again["rows"][0]
