"""LongLLaMA checkpoints against plain LLaMA: tiny folders with the config fields and tensor names of the real ones."""

import json
import logging
import os
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lcx
from lcx import longllama, models, plan
from lcx.errors import CorruptFileError, LcxError, ModelNotFoundError, UnsupportedModelError
from tests.fake_sources import alone, tiny_tokenizer  # noqa: F401

# config.json of syzymon/long_llama_3b_v1_1 and long_llama_code_7b, field by field.
CONFIG_3B = {
    "architectures": ["LongLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_longllama.LongLlamaConfig",
        "AutoModel": "modeling_longllama.LongLlamaModel",
        "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 3200,
    "initializer_range": 0.02,
    "intermediate_size": 8640,
    "max_position_embeddings": 2048,
    "mem_attention_grouping": None,
    "mem_dtype": "bfloat16",
    "mem_layers": [6, 12, 18],
    "mem_positionals": True,
    "model_type": "longllama",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.30.0",
    "use_cache": True,
    "vocab_size": 32000,
}
CONFIG_7B = CONFIG_3B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "last_context_length": 3072,
    "rope_theta": 1000000,
    "mem_layers": [8, 16, 24],
    "vocab_size": 32016,
    "torch_attention": False,
    "gradient_checkpoint_every_ith": 1,
}
TINY = {
    "hidden_size": 40,  # heads of 10: like the 100 of the 3B model, no multiple of 8
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "mem_layers": [0, 2],
    "vocab_size": 300,
}
FORMATS = ("safetensors", "sharded safetensors", "bin", "sharded bin")


@pytest.fixture(scope="module")
def reference():
    """Random weights in a plain LLaMA, rope_theta 10,000, made without any code of lcx."""
    fields = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "vocab_size",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            **{f: TINY[f] for f in fields},
            num_attention_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            rms_norm_eps=1e-6,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()


def write(folder, tensors, kind="safetensors", **fields):
    """A LongLLaMA folder with these tensors, and with code that a loader must not run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG_3B | TINY | fields))
    for name in ("configuration_longllama", "modeling_longllama"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the checkpoint was run')")
    tiny_tokenizer().save_pretrained(folder)
    save = save_file if "safetensors" in kind else torch.save
    name = "model.safetensors" if "safetensors" in kind else "pytorch_model.bin"
    if not kind.startswith("sharded"):
        save(tensors, folder / name)
        return folder
    stem, suffix = name.split(".")
    shards = [f"{stem}-{i:05}-of-00002.{suffix}" for i in (1, 2)]
    where = {tensor: shards[i % 2] for i, tensor in enumerate(tensors)}
    for shard in shards:
        save({k: v for k, v in tensors.items() if where[k] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def weights(model, stray=True):
    """Its tensors, with the buffer per layer that files of 2023 carry. The values are wrong, so using them shows."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((5,), 7.0) for i in range(3)}
    return tensors | (extra if stray else {})


def logits(model):
    ids = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def said(caplog):
    """What transformers has logged, which reaches the user's screen."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.messages
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_logits_of_plain_llama(tmp_path, reference, kind, said):
    folder = write(tmp_path / "long", weights(reference), kind)
    model, tokenizer = lcx.load(folder, device="cpu", dtype=torch.float32)
    assert type(model) is LlamaForCausalLM and model.config.model_type == "llama" and not model.training
    assert torch.equal(logits(model), logits(reference))
    assert tokenizer("def open(path)").input_ids == tiny_tokenizer()("def open(path)").input_ids
    assert model.lcx_source == "folder long"
    assert said() == []
    assert lcx.load(folder, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_memory_fields_and_their_defaults(tmp_path, reference):
    model, _ = lcx.load(write(tmp_path / "long", weights(reference)), device="cpu")
    config = model.config
    assert (config.mem_layers, config.mem_positionals, config.mem_dtype) == ([0, 2], True, "bfloat16")
    assert config.last_context_length == 1024
    assert config.rope_parameters["rope_theta"] == 10000 and config.rope_parameters["rope_type"] == "default"
    assert not any(hasattr(config, name) for name in ("auto_map", "mem_attention_grouping"))
    assert longllama.focused_settings(config) == {
        "memory_layers": (0, 2),
        "window": 64,
        "last_context": 1024,
        "memory_positions": True,
        "dtype": torch.bfloat16,
    }


def test_fields_that_are_given_are_used(tmp_path, reference):
    fields = {"rope_theta": 1e6, "last_context_length": 48, "mem_dtype": "float32", "mem_positionals": False}
    folder = write(tmp_path / "long", weights(reference), **fields)
    model, _ = lcx.load(folder, device="cpu", dtype=torch.float32)
    assert not torch.allclose(logits(model), logits(reference), atol=1e-2)
    config = LlamaConfig.from_dict(reference.config.to_dict())
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(reference.state_dict())
    assert torch.equal(logits(model), logits(other))
    settings = longllama.focused_settings(model.config)
    assert (settings["last_context"], settings["memory_positions"]) == (48, False)
    assert settings["dtype"] == torch.float32


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tensor_too_few_or_too_many_is_named(tmp_path, reference, kind, said):
    tensors = weights(reference)
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    with pytest.raises(CorruptFileError, match=r"model\.layers\.1\.input_layernorm\.weight missing") as e:
        lcx.load(write(tmp_path / "few", tensors, kind), device="cpu")
    one_line(e)
    tensors |= {"model.layers.1.input_layernorm.weight": norm, "model.layers.1.gate.weight": norm.clone()}
    with pytest.raises(CorruptFileError, match=r"model\.layers\.1\.gate\.weight unexpected") as e:
        lcx.load(write(tmp_path / "many", tensors, kind), device="cpu")
    one_line(e)
    tensors.pop("model.layers.1.gate.weight")
    tensors["lm_head.weight"] = torch.zeros(299, 40)
    with pytest.raises(CorruptFileError, match=r"lm_head\.weight of another shape") as e:
        lcx.load(write(tmp_path / "shape", tensors, kind), device="cpu")
    one_line(e)
    assert said() == []


def test_many_missing_tensors_are_still_one_line(tmp_path, reference):
    tensors = {k: v for k, v in weights(reference).items() if ".layers.2." not in k}
    with pytest.raises(CorruptFileError, match=r"model\.layers\.2\.\S+ and 8 more missing") as e:
        lcx.load(write(tmp_path / "long", tensors), device="cpu")
    one_line(e)


@pytest.mark.parametrize("kind", ("sharded safetensors", "sharded bin"))
def test_a_missing_shard(tmp_path, reference, kind):
    folder = write(tmp_path / "long", weights(reference), kind)
    next(folder.glob("*-00002-of-00002.*")).unlink()
    with pytest.raises(ModelNotFoundError, match="not complete") as e:
        lcx.load(folder, device="cpu")
    one_line(e)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["LCX_TEST_PROOF"],)


@pytest.mark.parametrize("kind", ("bin", "sharded bin"))
def test_a_pickle_with_code_is_refused(tmp_path, reference, kind, monkeypatch):
    proof = tmp_path / "proof"
    monkeypatch.setenv("LCX_TEST_PROOF", str(proof))
    folder = write(tmp_path / "long", weights(reference) | {"evil": Malicious()}, kind)
    with pytest.raises(CorruptFileError, match="never run: use a safetensors version") as e:
        lcx.load(folder, device="cpu")
    assert one_line(e) and not proof.exists()
    file = next(f for f in folder.glob("*.bin") if b"mkdir" in f.read_bytes())
    torch.load(file, weights_only=False)
    assert proof.is_dir()  # the code does run in a loader that lets it


@pytest.mark.parametrize("kind", ("safetensors", "bin"))
@pytest.mark.parametrize("kept", (0, 100, -1000))
def test_a_cut_file(tmp_path, reference, kind, kept):
    folder = write(tmp_path / "long", weights(reference), kind)
    file = next(f for f in folder.iterdir() if f.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptFileError, match="damaged") as e:
        lcx.load(folder, device="cpu")
    one_line(e)


def test_fields_that_make_no_sense(tmp_path, reference):
    cases = {
        "layer": ({"mem_layers": [0, 3]}, LcxError, r"mem_layers \[0, 3\] does not fit.* 0 to 2"),
        "below": ({"mem_layers": [-1]}, LcxError, "does not fit"),
        "number": ({"mem_layers": 2}, LcxError, "does not fit"),
        "dtype": ({"mem_dtype": "load"}, LcxError, "mem_dtype 'load' is unknown: use one of float32"),
        "rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, UnsupportedModelError, "rope_scaling"),
    }
    for name, (fields, error, match) in cases.items():
        with pytest.raises(error, match=match) as e:
            lcx.load(write(tmp_path / name, weights(reference), **fields), device="cpu")
        one_line(e)
    with pytest.raises(LcxError, match="pass memory_layers"):
        longllama.focused_settings(reference.config)


def test_without_memory_layers_it_is_still_a_llama(tmp_path, reference):
    folder = write(tmp_path / "long", weights(reference), mem_layers=[])
    model, _ = lcx.load(folder, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))
    with pytest.raises(LcxError, match="no memory layers"):
        longllama.focused_settings(model.config)


def test_saved_again(tmp_path, reference):
    """Plain transformers reads it as LLaMA, lcx.load still knows the memory."""
    folder = write(tmp_path / "long", weights(reference), "sharded bin", last_context_length=48)
    model, tokenizer = lcx.load(folder, device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "llama" and saved["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in saved
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(plain) is LlamaForCausalLM and torch.equal(logits(plain), logits(reference))
    again, _ = lcx.load(tmp_path / "saved", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(again), logits(reference))
    assert longllama.focused_settings(again.config) == longllama.focused_settings(model.config)
    assert again.config.last_context_length == 48


@pytest.mark.parametrize(
    "fields, params, per_token, last, theta",
    [(CONFIG_3B, 3_426_473_600, 38_400, 1024, 1e4), (CONFIG_7B, 6_738_546_688, 49_152, 3072, 1e6)],
    ids=["3b", "code_7b"],
)
def test_the_sizes_of_the_published_models(tmp_path, fields, params, per_token, last, theta):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = longllama.read_config(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(model.state_dict()) == 9 * config.num_hidden_layers + 3
    settings = longllama.focused_settings(config)
    assert settings["memory_layers"] == tuple(fields["mem_layers"]) and settings["last_context"] == last
    assert settings["window"] == fields["max_position_embeddings"]
    assert config.rope_parameters["rope_theta"] == theta
    shape = plan.ModelShape.from_config(config)
    assert shape.params == params
    assert plan.memory_bytes(shape, 3, 1, settings["dtype"]) == per_token
    assert plan.memory_bytes(shape, shape.layers, 5) == plan.kv_bytes(shape, 5)
    with pytest.raises(LcxError, match="not possible"):
        plan.memory_bytes(shape, shape.layers + 1, 1)


REPOSITORY = ["README.md", "config.json", "modeling_longllama.py", "tokenizer.model", "tokenizer_config.json"]
SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.fixture
def hub(alone, tmp_path, reference, monkeypatch):  # noqa: F811
    """A hub with one repository: `files` is what it lists, `fetched` what was asked for of it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    class Hub:
        files = [*REPOSITORY, *SHARDS, "pytorch_model.bin.index.json", "quantized/pytorch_model_8bit.bin"]
        files.append("quantized/model.safetensors")
        fetched = None
        folder = write(tmp_path / "0123456789", weights(reference), "sharded bin")

        def download(self, repository, local_files_only=False, etag_timeout=None, **patterns):
            if local_files_only and self.fetched is None:
                raise LocalEntryNotFoundError("not cached")
            if not local_files_only:
                self.fetched = set(filter_repo_objects(self.files, **patterns))
            return str(self.folder)

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda api, repository: hub.files)
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    return hub


def test_from_the_hub_only_what_is_needed(hub, reference):
    model, _ = lcx.load("syzymon/long_llama_code_7b_instruct", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))
    tokenizer = {"config.json", "tokenizer.model", "tokenizer_config.json"}
    assert hub.fetched == tokenizer | {*SHARDS, "pytorch_model.bin.index.json"}
    hub.files = [*REPOSITORY, *SHARDS, "model.safetensors", "onnx/model.safetensors"]
    hub.fetched = None
    lcx.load("syzymon/long_llama_3b", device="cpu")
    assert hub.fetched == tokenizer | {"model.safetensors"}


def test_half_a_download_is_not_taken_for_the_model(hub):
    hub.fetched = set()
    assert models._in_hub_cache("a/b") == hub.folder
    (hub.folder / SHARDS[1]).rename(hub.folder / "elsewhere")
    assert models._in_hub_cache("a/b") is None
    (hub.folder / "model.safetensors").touch()  # the other format is complete
    assert models._in_hub_cache("a/b") == hub.folder


def sentencepiece_model(path, **how):
    """BPE with byte fallback, as OpenLLaMA's: the default normalizer folds runs of spaces into one."""
    spm = pytest.importorskip("sentencepiece")
    lines = ["def open(path): return a thermal fox", "the quick brown fox", "    return a + b"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        **how,
    )
    path.with_suffix(".vocab").unlink()
    return spm.SentencePieceProcessor(model_file=str(path))


TEXTS = [
    "thermal",
    "a    b",
    "  two",
    "two  ",
    "a\n\nb",
    "ä€ 漢 🦊",
    "ﬁ x² ½",
    "",
    " ",
    "def open(path):\n    return 1",
]


@pytest.mark.parametrize("folds", (True, False), ids=("v1", "v2"))
def test_tokenizer_model_gives_what_sentencepiece_gives(tmp_path, reference, folds):
    """Version 1 of OpenLLaMA's tokenizer folds spaces, version 2 keeps them."""
    folder = write(tmp_path / "long", weights(reference))
    how = {} if folds else {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    for file in folder.glob("tokenizer*"):
        file.unlink()
    truth = sentencepiece_model(folder / "tokenizer.model", **how)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "legacy": False,
                "model_max_length": 2048,
                "sp_model_kwargs": {},
                "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True},
                "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
                "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True},
                "pad_token": None,
            }
        )
    )
    model, tokenizer = lcx.load(folder, device="cpu", dtype=torch.float32)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == [1, *truth.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == truth.decode(truth.encode(text)), text
    assert (tokenizer("a    b").input_ids == tokenizer("a b").input_ids) is folds
    assert tokenizer("a</s>").input_ids == [1, *truth.encode("a"), 2]
    assert tokenizer.decode([1, *truth.encode("a"), 2]) == "<s>a</s>"
    assert tokenizer("a", add_special_tokens=False).input_ids == truth.encode("a")
    assert len(tokenizer) == 300 and tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    batch = tokenizer("def open", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, batch.input_ids.shape[1] + 3)

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "LlamaTokenizer"
    shutil.rmtree(folder)
    _, again = lcx.load(tmp_path / "saved", device="cpu")
    assert [again(t).input_ids for t in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]


def test_without_sentencepiece_one_line_says_what_to_install(tmp_path, reference, monkeypatch):
    folder = write(tmp_path / "long", weights(reference))
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LcxError, match="python -m pip install sentencepiece") as e:
        lcx.load(folder, device="cpu")
    one_line(e)
