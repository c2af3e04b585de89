"""The landmark measurement for a GPU, at tiny size on the CPU: the same functions, the same figures."""

import json
import math

import pytest
import torch

from lcx import measure
from lcx.errors import LcxError
from lcx.measure import landmark_smollm2


@pytest.mark.slow
def test_a_model_trained_with_landmarks_is_compared_with_the_plain_one(tmp_path):
    from lcx.finetune import finetune
    from lcx.finetune_landmark import LandmarkSettings
    from lcx.models import load

    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. The sun is yellow. " * 400)
    settings = LandmarkSettings("lm-256", (str(text),), block_size=8, train_length=128, steps=4, batch_size=2)
    finetune(settings, tmp_path / "out")
    plain, _ = load("lm-256", device="cpu")
    tuned, tokenizer = load(tmp_path / "out", device="cpu")
    texts = [tokenizer(text.read_text()).input_ids]
    before = {n: p.clone() for n, p in plain.state_dict().items()}

    def partial(name):
        return tmp_path / f"{name}.json"

    def compared():
        return landmark_smollm2.compare(
            plain, tuned, tokenizer, texts, (192, 384), (192,), samples=1, last=32, partial=partial
        )

    rows = compared()
    assert [(r["model"], r["length"]) for r in rows] == [
        *(("plain", n) for n in (192, 384)),
        *(("landmarks, not trained for them", n) for n in (192, 384)),
        *(("trained with landmarks", n) for n in (192, 384)),
        ("trained with landmarks, read densely", 192),
    ]
    assert all(r["of"] == 5 and 0 <= r["passkeys"] <= 5 and math.isfinite(r["loss"]) for r in rows)
    by = {(r["model"], r["length"]): r["loss"] for r in rows}
    assert by["trained with landmarks", 384] < by["landmarks, not trained for them", 384], (
        "trained on this text"
    )
    assert all(torch.equal(p, before[n]) for n, p in plain.state_dict().items()), (
        "the plain model stays plain"
    )
    assert len(json.loads(partial("plain").read_text())["rows"]) == 10
    assert compared() == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(LcxError, match="smollm2-landmark needs a CUDA GPU: run it on one"):
        measure.run("smollm2-landmark")
