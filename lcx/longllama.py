"""LongLLaMA checkpoints as plain LLaMA, without the code they ship (Tworkowski et al. 2023, arXiv:2307.03170).

A LongLLaMA checkpoint has the tensors of LLaMA, none added and none renamed; only its config.json says more: which
layers have a memory and how it is used. Those fields stay on the config, `focused_settings` turns them into the
arguments of FocusedAttention, and without it the model is an ordinary LLaMA.
"""

from __future__ import annotations

import importlib.util
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import logging

from .errors import CorruptFileError, LcxError, UnsupportedModelError

# The memory fields, with the values they have where config.json is silent (the first checkpoints name only three).
MEMORY_FIELDS = {
    "mem_layers": (),
    "mem_positionals": True,
    "mem_dtype": "bfloat16",
    "last_context_length": 1024,
}
# What only the shipped code needs: where it is, and how it computes.
_DROPPED = ("_name_or_path", "architectures", "auto_map", "model_type") + (
    "gradient_checkpoint_every_ith",
    "mem_attention_grouping",
    "torch_attention",
)


def read_config(folder: Path) -> LlamaConfig | None:
    """The checkpoint's config as LlamaConfig with the memory fields, or None if it is no LongLLaMA.

    A LLaMA with memory fields, as `save_pretrained` of a loaded LongLLaMA writes it, counts as one. Raises
    UnsupportedModelError for a LongLLaMA with scaled RoPE, LcxError if a memory field makes no sense.
    """
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    kind = fields.get("model_type")
    if kind != "longllama" and not (kind == "llama" and "mem_layers" in fields):
        return None
    if kind == "longllama" and fields.get("rope_scaling"):
        raise UnsupportedModelError(f"{folder.name}: LongLLaMA has no scaled RoPE, set rope_scaling to null")
    kept = {name: value for name, value in fields.items() if name not in _DROPPED}
    config = LlamaConfig.from_dict(MEMORY_FIELDS | kept)
    if config.mem_layers:
        focused_settings(config)
    return config


def focused_settings(config: Any) -> dict[str, Any]:
    """The arguments with which `lcx.FocusedAttention` does what this checkpoint was trained for.

    config: `model.config` of a loaded LongLLaMA. memory_layers are 0-based; window and last_context are in tokens.
    Raises LcxError if the config has no memory layers, names one that the model does not have, or another dtype
    than float32, float16 or bfloat16.
    """
    layers = getattr(config, "mem_layers", None)
    if not layers:
        raise LcxError("this config names no memory layers: load a LongLLaMA, or pass memory_layers=(...)")
    possible = range(config.num_hidden_layers)
    if not isinstance(layers, (list, tuple)) or not set(layers) <= set(possible):
        raise LcxError(
            f"mem_layers {layers} does not fit: config.json must list layers from 0 to {possible[-1]}"
        )
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if config.mem_dtype not in dtypes:
        raise LcxError(f"mem_dtype {config.mem_dtype!r} is unknown: use one of {', '.join(dtypes)}")
    return {
        "memory_layers": tuple(sorted(set(layers))),
        "window": config.max_position_embeddings,
        "last_context": config.last_context_length,
        "memory_positions": config.mem_positionals,
        "dtype": dtypes[config.mem_dtype],
    }


def read_model(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """The weights, from safetensors or PyTorch files, sharded or not. Only tensors are read, never pickled objects.

    Raises CorruptFileError, with the name, if a tensor is missing, has another shape or should not be there.
    `rotary_emb.inv_freq`, which LLaMA files of 2023 carry, is computed anew and ignored.
    """
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # the table of missing tensors: the error below says it in one line
    try:
        model, found = LlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(shown)
    shapes = {name for name, *_ in found["mismatched_keys"]}
    missing = found["missing_keys"] - shapes
    for names, what in (
        (missing, "missing"),
        (found["unexpected_keys"], "unexpected"),
        (shapes, "of another shape"),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CorruptFileError(
                f"the weights in {folder.name} do not fit config.json: {first}{more} {what}; fetch it again"
            )
    return model


def read_tokenizer(folder: Path, config: LlamaConfig):
    """SentencePiece itself where there is a tokenizer.model, else what transformers makes of tokenizer.json.

    Raises LcxError if the package sentencepiece is needed and not installed.
    """
    if not (folder / "tokenizer.model").is_file():
        return AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    if importlib.util.find_spec("sentencepiece") is None:
        raise LcxError(
            f"the tokenizer of {folder.name} is a SentencePiece model: run python -m pip install sentencepiece"
        )
    return LlamaTokenizer.from_pretrained(folder, local_files_only=True)


class LlamaTokenizer(SentencePieceBackend):
    """The SentencePiece model as it was trained, with `<s>` before every text.

    transformers' class of the same name rebuilds it as a fast tokenizer without its normalizer. OpenLLaMA's folds
    runs of spaces into one, and the rebuilt tokenizer then gives tokens that the model never saw in training
    (huggingface/transformers issues 24233 and 25069). The name is kept for the tokenizer_config.json it saves.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs):
        # legacy: leave the leading space to SentencePiece.
        kwargs |= {"legacy": True, "special_tokens_pattern": "bos", "clean_up_tokenization_spaces": False}
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Through SentencePiece, which puts bytes together again; added and special tokens as they are."""
        groups = groupby(tokens, key=lambda token: token in self.added_tokens_encoder)
        return "".join("".join(g) if added else self.sp_model.decode(list(g)) for added, g in groups)
