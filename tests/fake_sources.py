"""Small fake sources for the tests: a wheel, a LLaMA in a GGUF, a checkpoint folder. Nothing comes from the network."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty cache, a package index that holds only what is put into the folder `wheels`, and no hub."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {
        "LCX_CACHE": tmp_path / "cache",
        "LCX_STATIC": 1,
        "HF_HUB_OFFLINE": 1,
        "HF_HUB_CACHE": tmp_path / "hub",
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": wheels,
        "PIP_CONFIG_FILE": os.devnull,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LCX_WEIGHTS", raising=False)
    return wheels


def wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """A valid wheel of `package` with the given files."""
    info = f"{package}-{version}.dist-info"
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return path


def tiny_llama(seed: int = 0):
    """A random LLaMA with 4 query heads and 2 key-value heads of 16, and a vocabulary of 300."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer():
    """Byte-level BPE with 300 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(os.__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def interleave(weight: torch.Tensor, heads: int):
    """Rows as llama.cpp stores q and k, written out row by row: j and j + d/2 of a head become neighbours."""
    d = len(weight) // heads
    rows = [h * d + j + half * d // 2 for h in range(heads) for j in range(d // 2) for half in (0, 1)]
    return weight[rows]


def gguf(path: Path, model, tokenizer, quantise: str | None = None, architecture: str = "llama") -> Path:
    """Write a LLaMA and its tokenizer as GGUF, the matrices float32 or quantised ("Q4_1", "Q8_0")."""
    import json

    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

    c = model.config
    w = GGUFWriter(path, architecture)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_vocab_size(c.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(bpe["vocab"], key=bpe["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_token_list(words)
    w.add_token_types([TokenType.CONTROL if i < 3 else TokenType.NORMAL for i in range(len(words))])
    w.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in bpe["merges"]])
    w.add_bos_token_id(1), w.add_eos_token_id(2), w.add_pad_token_id(2), w.add_unk_token_id(0)
    w.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name or "k_proj" in name:
            tensor = interleave(tensor, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{names[rest]}"
        else:
            stem = names[stem]
        data = tensor.detach().numpy().copy()
        if quantise and data.ndim == 2:
            kind = GGMLQuantizationType[quantise]
            w.add_tensor(f"{stem}.weight", quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(f"{stem}.weight", data)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()
    w.close()
    return path
