"""The released weight difference: recovered on pairs of tiny folders that are built like the real ones of 2023."""

import io
import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lcx
from lcx import LandmarkAttention, cli, landmark_llama
from lcx.errors import CorruptFileError, LcxError, ModelNotFoundError
from lcx.landmark_llama import make_diff, recover
from lcx.weights import Weights

# config.json of epfml/landmark-attention-llama7b-wdiff, field by field; sizes are replaced below.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.29.1",
    "use_cache": True,
    "vocab_size": 32002,
}
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
FORMATS = ("sharded bin", "bin", "safetensors")


def random_llama(vocabulary, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**TINY, vocab_size=vocabulary, initializer_range=0.2, rms_norm_eps=1e-6)
        config.tie_word_embeddings = False
        return LlamaForCausalLM(config).eval()


def tokenizer_files(folder, landmark=True):
    """SentencePiece with 32 pieces, and the files that transformers 4.29 wrote beside it."""
    spm = pytest.importorskip("sentencepiece")
    text = iter(["the grass is green, the sky is blue and the sun is yellow"] * 50)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        vocab_size=32,
        model_type="bpe",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": 512,
        "padding_side": "right",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if landmark:
        special |= {"additional_special_tokens": ["<landmark>"], "pad_token": "[PAD]"}
        (folder / "added_tokens.json").write_text(json.dumps({"<landmark>": 33, "[PAD]": 32}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def write(folder, tensors, vocabulary, kind="sharded bin", **fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | TINY | {"vocab_size": vocabulary} | fields))
    tokenizer_files(folder, landmark=vocabulary == 34)
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        shards = [f"pytorch_model-{i:05}-of-00003.bin" for i in (1, 2, 3)]
        where = {name: shards[i % 3] for i, name in enumerate(tensors)}
        for shard in shards:
            torch.save({k: v for k, v in tensors.items() if where[k] == shard}, folder / shard)
        index = {"metadata": {}, "weight_map": dict(sorted(where.items()))}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def frequencies():
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inv_freq for i in range(2)}


@pytest.fixture(scope="module")
def pair():
    """(state of a LLaMA, state of one with two tokens more, their difference and its sum as the reference makes them)."""
    base = {n: t.detach().half() for n, t in random_llama(32, 0).state_dict().items()}
    tuned = {n: t.detach().clone() for n, t in random_llama(34, 1).state_dict().items()}
    difference = {}
    for name, weight in tuned.items():
        old = base[name].float()
        if "embed_tokens" in name or "lm_head" in name:
            old = torch.cat([old, old.mean(0, keepdim=True).repeat(2, 1)])
        difference[name] = weight - old
    zeros = {name: torch.zeros_like(f) for name, f in frequencies().items()}
    total = sum(t.double().sum() for t in (*tuned.values(), *frequencies().values())).item()
    return base, tuned, difference | zeros, total


@pytest.fixture
def folders(pair, tmp_path):
    """The folders of base and difference, the latter with the checksum."""
    base = write(tmp_path / "base", pair[0] | frequencies(), 32)
    diff = write(tmp_path / "diff", pair[2], 34)
    (diff / "checksum_psum.txt").write_text(f"{pair[3]}\n")
    return base, diff


def close(folder, tensors):
    found = Weights(folder)
    assert set(found.names) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("of_base", FORMATS)
@pytest.mark.parametrize("of_difference", FORMATS)
def test_the_sum_is_the_tuned_model(pair, tmp_path, of_base, of_difference):
    base = write(tmp_path / "base", pair[0], 32, of_base)  # as converted today: without frequencies
    diff = write(tmp_path / "diff", pair[2], 34, of_difference)
    (diff / "checksum_psum.txt").write_text(str(pair[3]))
    assert recover(base, diff, tmp_path / "out") == tmp_path / "out"
    close(tmp_path / "out", pair[1])
    assert not list(tmp_path.glob(".part-*"))


def test_it_loads_with_its_tokenizer_and_fields(pair, folders, tmp_path):
    recover(*folders, tmp_path / "out", shard_bytes=3000)
    model, tokenizer = lcx.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    c = model.config
    assert (c.mem_id, c.mem_freq, c.train_context_length, c.include_landmark_in_loss) == (33, 50, 512, True)
    assert (tokenizer.convert_tokens_to_ids("<landmark>"), tokenizer.pad_token_id, len(tokenizer)) == (
        33,
        32,
        34,
    )
    tuned = LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=34, rms_norm_eps=1e-6)).eval()
    tuned.load_state_dict(pair[1])
    ids = tokenizer("the sky is blue", return_tensors="pt").input_ids
    assert ids[0, 0] == 1 and ids.max() < 32
    with torch.no_grad(), LandmarkAttention.of(model)(model) as landmark:
        s = landmark.settings
        # 4 + 1 blocks of 51 and a chunk of as many fit into 512.
        assert (s.block_size, s.train_length, s.window, s.loss_at_landmarks) == (51, 512, 255, True)
        # In a first, unfinished block there is nothing to retrieve.
        expected = tuned(ids).logits.index_fill(-1, torch.tensor(33), float("-inf"))
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        out = model.generate(ids, max_new_tokens=120, min_new_tokens=120, do_sample=False)
        assert out.shape[1] == ids.shape[1] + 120 and 33 not in out


def test_shards_stay_small_and_nothing_else_is_kept(folders, tmp_path, monkeypatch):
    saved = []

    def save(tensors, path, **more):
        saved.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, path, **more)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    recover(*folders, tmp_path / "out", shard_bytes=3000)
    assert len(saved) > 3 and max(saved) <= 3000
    files = {p.name for p in (tmp_path / "out").iterdir()}
    shards = {f"model-{i:05}-of-{len(saved):05}.safetensors" for i in range(1, len(saved) + 1)}
    copied = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert files == shards | copied | {"config.json", "model.safetensors.index.json"}
    with safe_open(tmp_path / "out" / min(shards), "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_recover_undoes_make_diff(pair, tmp_path):
    base = write(tmp_path / "base", pair[0], 32)
    tuned = write(tmp_path / "tuned", pair[1] | frequencies(), 34, mem_freq=9, include_landmark_in_loss=False)
    make_diff(tuned, base, tmp_path / "diff", shard_bytes=4000)
    close(tmp_path / "diff", {n: t for n, t in pair[2].items() if "inv_freq" not in n})
    without = sum(t.double().sum() for t in pair[1].values()).item()
    assert float((tmp_path / "diff" / "checksum_psum.txt").read_text()) == pytest.approx(without, abs=1e-4)
    recover(base, tmp_path / "diff", tmp_path / "out")
    close(tmp_path / "out", pair[1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mem_id"], config["mem_freq"], config["include_landmark_in_loss"]) == (33, 9, False)
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    again = recover(base, tmp_path / "diff", tmp_path / "again")
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "out").iterdir())


def test_the_total_is_summed_like_the_released_one():
    """In float32, layer by layer, in the order of the modules of transformers 4.28: one of another order is off."""
    from lcx.landmark_llama import _total

    def layer(i):
        attention = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + ["self_attn.rotary_emb.inv_freq"]
        rest = [f"mlp.{p}_proj.weight" for p in ("gate", "down", "up")]
        norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        return [f"model.layers.{i}.{name}" for name in attention + rest + norms]

    names = ["model.embed_tokens.weight", *(n for i in range(12) for n in layer(i))]
    names += ["model.norm.weight", "lm_head.weight"]
    values = 2000 * torch.randn(len(names), generator=torch.Generator().manual_seed(0))
    sums = dict(zip(names, values, strict=True))

    def one_by_one(order):
        total = torch.zeros(())
        for name in order:
            total = total + sums[name]
        return total.item()

    assert one_by_one(sorted(names)) != one_by_one(names)
    assert _total({name: sums[name] for name in sorted(names)}) == one_by_one(names)


# What can be wrong -------------------------------------------------------------------------------------------------


def refused(error, words, *args, **options):
    with pytest.raises(error, match=words) as e:
        recover(*args, **options)
    assert "\n" not in str(e.value)
    assert not list(args[2].parent.glob(".part-*"))


def test_another_base_is_found_by_its_shapes_or_its_sum(pair, folders, tmp_path):
    base, diff = folders
    narrow = {n: (t[:, :8].clone() if "q_proj" in n else t) for n, t in pair[0].items()}
    out = tmp_path / "out"
    refused(LcxError, r"layers\.0\.self_attn\.q_proj\.weight is \[16, 8\] in narrow and \[16, 16\]", write(tmp_path / "narrow", narrow, 32), diff, out)  # fmt: skip
    larger = {n: (torch.cat([t, t]) if "embed" in n else t) for n, t in pair[0].items()}
    refused(
        LcxError, r"embed_tokens\.weight is \[64, 16\]", write(tmp_path / "larger", larger, 64), diff, out
    )
    fewer = {n: t for n, t in pair[0].items() if "layers.1.mlp.up" not in n}
    refused(LcxError, r"layers\.1\.mlp\.up_proj\.weight is in diff and not in fewer", write(tmp_path / "fewer", fewer, 32), diff, out)  # fmt: skip
    other = {n: t.half() for n, t in random_llama(32, 5).state_dict().items()}
    other = write(tmp_path / "other", other, 32)
    refused(CorruptFileError, r"sum up to \S+ instead of \S+: other is another base", other, diff, out)
    assert not out.exists()
    recover(other, diff, out, check=False)


def test_a_sum_to_compare_with(folders, tmp_path, monkeypatch):
    base, diff = folders
    (diff / "checksum_psum.txt").write_text("forty\n")
    refused(CorruptFileError, "holds no number", base, diff, tmp_path / "out")
    recover(base, diff, tmp_path / "unchecked", check=False)
    (diff / "checksum_psum.txt").unlink()
    refused(LcxError, "has no checksum_psum.txt and is not the released one", base, diff, tmp_path / "out")
    # The released difference has none either: what it must give is known.
    monkeypatch.setattr(landmark_llama, "RELEASED_ROWS", (34, 16))
    refused(CorruptFileError, r"instead of 49798\.7656", base, diff, tmp_path / "out")


def test_a_number_that_is_none_is_refused(pair, folders, tmp_path):
    broken = dict(pair[2])
    broken["model.norm.weight"] = torch.full((16,), float("nan"))
    broken = write(tmp_path / "broken", broken, 34)
    (broken / "checksum_psum.txt").write_text(str(pair[3]))
    refused(CorruptFileError, "sum up to nan", folders[0], broken, tmp_path / "out")


@pytest.mark.parametrize("which", [0, 1])
def test_missing_and_damaged_files(folders, tmp_path, which):
    out, folder = tmp_path / "out", folders[which]
    shard = folder / "pytorch_model-00002-of-00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:300])
    refused(CorruptFileError, r"00002-of-00003\.bin is damaged", *folders, out)
    shard.unlink()
    refused(ModelNotFoundError, r"lacks pytorch_model-00002-of-00003\.bin: fetch it again", *folders, out)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    refused(ModelNotFoundError, "holds no weights", *folders, out)
    (folder / "config.json").unlink()
    refused(ModelNotFoundError, "holds no config.json", *folders, out)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["LCX_TEST_PROOF"],)


def test_a_pickle_with_code_is_refused(pair, folders, tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    monkeypatch.setenv("LCX_TEST_PROOF", str(proof))
    evil = write(tmp_path / "evil", pair[2] | {"evil": Malicious()}, 34, "bin")
    refused(CorruptFileError, "never run", folders[0], evil, tmp_path / "out")
    assert not proof.exists()


def test_a_folder_in_use_and_a_difference_without_landmark(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(LcxError, "out is in use", *folders, out)
    (folders[1] / "added_tokens.json").unlink()
    refused(LcxError, "names no landmark", *folders, tmp_path / "new")


def test_a_tokenizer_without_the_landmark_is_not_loaded(folders, tmp_path):
    recover(*folders, tmp_path / "out")
    (tmp_path / "out" / "added_tokens.json").unlink()
    tokenizer_files(tmp_path / "out", landmark=False)
    with pytest.raises(LcxError, match="has no landmark, which config.json says is token 33: copy"):
        lcx.load(tmp_path / "out", device="cpu")


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LCX_STATIC", "1")
    args = ["lcx", "landmark", "recover", *map(str, folders), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code and capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: load it with")
    (folders[1] / "checksum_psum.txt").write_text("1.5")
    monkeypatch.setattr(sys, "argv", [*args[:-1], str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: the recovered weights sum up to"), (
        err
    )
