"""Turn a LLaMA in a GGUF file (llama.cpp's format, often quantised) into an ordinary transformers checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UnsupportedModelError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def unpermute(weight, heads: int):
    """Undo llama.cpp's order of the rows of a q or k projection, numpy [heads * head_dim, hidden_size].

    GGUF pairs neighbouring rows 2j and 2j+1 for RoPE, transformers pairs rows j and j + head_dim/2 of a head.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensor_name(name: str) -> str:
    """The name in transformers of a tensor in the GGUF. Raises UnsupportedModelError for one a LLaMA does not have."""
    parts = name.split(".")
    if name in _TOP:
        return _TOP[name]
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    raise UnsupportedModelError(
        f"the GGUF has a tensor {name} that a plain LLaMA does not have: use a LLaMA GGUF"
    )


def convert(gguf_file: str | Path, out: str | Path) -> None:
    """Write model.safetensors (float32), config.json and the tokenizer with its chat template to the folder `out`.

    Quantised tensors become the float32 numbers they stand for, exactly. Shows a progress bar unless LCX_STATIC=1.
    Raises UnsupportedModelError for an architecture other than llama.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    gguf_file, out = Path(gguf_file), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf_file)
    meta = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.ggml.")}
    ids = {k: reader.fields.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding")}
    if meta["general.architecture"] != "llama":
        raise UnsupportedModelError(
            f"the GGUF holds a {meta['general.architecture']} model: use a LLaMA GGUF"
        )
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]

    tensors = {}
    for tensor in tqdm(
        reader.tensors, desc="converting", unit="tensor", disable=os.environ.get("LCX_STATIC") == "1"
    ):
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, heads)
        if ".attn_k." in tensor.name:
            weight = unpermute(weight, kv_heads)
        tensors[tensor_name(tensor.name)] = torch.from_numpy(np.array(weight, np.float32))
    config = LlamaConfig(
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="lm_head.weight" not in tensors,
        **{f"{k.removesuffix('ding')}_token_id": f.contents() for k, f in ids.items() if f},
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    # AutoTokenizer of transformers 5.0 takes this one for CodeLlama's, and puts a token before every text.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for kind, field in ids.items():
        if field:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            setattr(tokenizer, f"{kind.removesuffix('ding')}_token", token)
    tokenizer.save_pretrained(out)
