"""A memory as a file: one safetensors file whose header says which model made it and carries a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CorruptFileError, LcxError
from .fetch import staging

OPTIONS = ("tier", "max_tokens", "top_k", "lookup", "page_tokens")


def digest(header: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of the header and of every (name, tensor): its bytes, dtype and shape."""
    sha = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.view(torch.uint8).numpy())
    return sha.hexdigest()


def write(memory, path: Path, fingerprint: Mapping[str, Any]) -> Path:
    """See Memory.save. Tensor "i.layer" holds keys and values of piece i, "i.mask" its mask, if it has one."""
    tensors = {}
    for i, segment in enumerate(memory.segments):
        for layer in memory.layers:
            tensors[f"{i:06d}.{layer}"] = segment.read(layer, "cpu").contiguous()
        if segment.page.mask is not None:
            tensors[f"{i:06d}.mask"] = segment.mask("cpu").contiguous()
    options = {name: getattr(memory, name) for name in OPTIONS}
    header = json.dumps({"fingerprint": dict(fingerprint), "layers": memory.layers, "options": options})
    metadata = {"lcx_memory": header, "sha256": digest(header, sorted(tensors.items()))}
    try:
        with staging(path.parent) as folder:
            save_file(tensors, folder / "memory", metadata=metadata)
            os.replace(folder / "memory", path)
    except (OSError, SafetensorError) as e:
        raise LcxError(f"cannot write the memory to {path} ({e}): free space, or choose another place") from e
    return path


def read(cls, path: Path, fingerprint: Mapping[str, Any], device, options: Mapping[str, Any]):
    """See Memory.load."""
    if not path.is_file():
        raise LcxError(f"there is no memory file {path}: check the name, or save a memory there first")
    damaged = CorruptFileError(f"{path.name} is damaged, or no memory saved by lcx: save it again")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
            header = json.loads(metadata["lcx_memory"])
            check_fingerprint(path.name, header["fingerprint"], json.loads(json.dumps(dict(fingerprint))))
            tensors = ((name, file.get_tensor(name)) for name in names)
            if digest(metadata["lcx_memory"], tensors) != metadata["sha256"]:
                raise damaged
            memory = cls(header["layers"], **{**header["options"], **options})
            for piece in sorted({name.split(".")[0] for name in names}):
                kv = {i: tuple(file.get_tensor(f"{piece}.{i}").to(device)) for i in memory.layers}
                mask = f"{piece}.mask"
                memory.append(kv, file.get_tensor(mask).to(device) if mask in names else None)
    except (SafetensorError, KeyError, ValueError) as e:
        raise damaged from e
    return memory


def check_fingerprint(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise LcxError, saying what differs, unless a memory's model is the one it is loaded for."""
    keys = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
    if keys:
        differ = "; ".join(f"{key}: {theirs.get(key)} in the file, {ours.get(key)} here" for key in keys)
        raise LcxError(
            f"{name} is the memory of another model ({differ}): load that model, or fill a new memory"
        )
