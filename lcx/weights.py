"""The tensors of a checkpoint folder one by one, for work on weights that do not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .errors import CorruptFileError, ModelNotFoundError


class Weights:
    """`weights[name]` reads one tensor of a folder with safetensors or PyTorch files, sharded or not.

    Files are mapped, not read whole; of PyTorch files only tensors are read, never pickled objects.
    Raises ModelNotFoundError if the folder is no checkpoint or a shard is missing, CorruptFileError if a file is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._file = self._files()
        self.names = list(self._file)

    def shape(self, name: str) -> torch.Size:
        tensor = self._entry(name)
        return torch.Size(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._entry(name)
        return tensor if isinstance(tensor, Tensor) else tensor[:]

    def _files(self) -> dict[str, str]:
        if not (self.folder / "config.json").is_file():
            raise ModelNotFoundError(f"{self.folder} holds no config.json: give the folder of a checkpoint")
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                files = json.loads(index.read_text("utf-8"))["weight_map"]
                for file in sorted(set(files.values())):
                    if not (self.folder / file).is_file():
                        raise ModelNotFoundError(f"{self.folder} lacks {file}: fetch it again")
                return files
            if (self.folder / name).is_file():
                return dict.fromkeys(self._open(name), name)
        raise ModelNotFoundError(
            f"{self.folder} holds no weights: neither model.safetensors nor pytorch_model.bin"
        )

    def _entry(self, name: str):
        opened = self._open(self._file[name])
        if name not in opened:
            raise CorruptFileError(f"{self.folder / self._file[name]} lacks {name}: fetch it again")
        return opened[name]

    def _open(self, file: str) -> Mapping[str, Any]:
        from safetensors import SafetensorError, safe_open

        if file not in self._opened:
            path = self.folder / file
            try:
                if path.suffix == ".safetensors":
                    tensors = safe_open(path, "pt")
                    self._opened[file] = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                else:
                    self._opened[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as e:
                raise CorruptFileError(
                    f"{path} is damaged, or holds more than tensors, and code in a checkpoint is never run: fetch it again"
                ) from e
        return self._opened[file]
