"""The released Landmark LLaMA-7B, which is published as its difference to LLaMA-7B (epfml/landmark-attention-llama7b-wdiff).

Landmark Attention adds no parameters but the rows of two new tokens, so the sum of both checkpoints is a plain LLaMA. What its
attention needs to know stands in four fields of config.json.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CorruptFileError, LcxError
from .fetch import staging
from .landmark_tokens import LANDMARK
from .results import write_json
from .weights import Weights

# The fields of the reference's config class with the values of the released checkpoint, whose own config.json has none.
LANDMARK_FIELDS = {"mem_freq": 50, "train_context_length": 512, "include_landmark_in_loss": True}
RELEASED_ROWS, RELEASED_TOTAL = (32002, 4096), 49798.7656
TOLERANCE = 1e-2
CHECKSUM = "checksum_psum.txt"
SHARD_BYTES = 5_000_000_000
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_COPIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json") + (
    "added_tokens.json",
    "generation_config.json",
)
# The released total is a sum in float32 over the state dict of the model of its day. Near 50,000 each addition rounds
# to 1/256, so another order could miss it by more than the tolerance.
_OUTER = ("embed_tokens", ".layers.", "model.norm", "lm_head")
_INNER = ("q_proj", "k_proj", "v_proj", "o_proj", "inv_freq", "gate_proj", "down_proj", "up_proj") + (
    "input_layernorm",
    "post_attention_layernorm",
)


def recover(
    base: str | Path,
    difference: str | Path,
    out: str | Path,
    check: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """base + difference, written to the new folder `out` as float32 safetensors that `lcx.load` reads. Returns `out`.

    base: LLaMA-7B in the format of transformers; difference: the released folder, or one of make_diff; the weights of both
    in safetensors or PyTorch files, of which only tensors are read. Tensors pass one by one, so that little more than one
    shard of the result is in memory. New rows of the embeddings are the mean of the old ones plus their difference.
    check: compare the sum of all weights with that in the difference's checksum_psum.txt, or with the released one.

    Raises LcxError if base and difference do not fit, naming the tensor, if `out` is in use, or if there is no sum to
    compare with; ModelNotFoundError if a file is missing; CorruptFileError if one is damaged or the sum is another.
    """
    base, diff = Weights(base), Weights(difference)
    config, names = _config(diff.folder), _fitting(base, diff)
    wanted = _expected_total(diff) if check else None

    def end(folder: Path, sums: dict[str, Tensor]) -> None:
        # Files of 2023 hold the frequencies of RoPE too, and the released total counts them.
        frequencies = {name: _inv_freq(config).sum() for name in diff.names if name.endswith("inv_freq")}
        total = _total(sums | frequencies)
        if wanted is not None and not abs(total - wanted) <= TOLERANCE:
            raise CorruptFileError(
                f"the recovered weights sum up to {total:.4f} instead of {wanted:.4f}: {base.folder.name} is another "
                f"base, or a file in it or in {diff.folder.name} is damaged; fetch both again"
            )
        write_json(folder / "config.json", config)

    return _write(Path(out), diff, names, lambda n: _grown(base, diff, n).add_(diff[n]), end, shard_bytes)


def make_diff(tuned: str | Path, base: str | Path, out: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """The inverse of recover: tuned - base in the new folder `out`, with the sum of the tuned weights for its check.

    Raises what recover raises.
    """
    tuned, base = Weights(tuned), Weights(base)
    config, names = _config(tuned.folder), _fitting(base, tuned)

    def end(folder: Path, _: dict[str, Tensor]) -> None:
        (folder / CHECKSUM).write_text(f"{_total({n: tuned[n].float().sum() for n in names})}\n")
        write_json(folder / "config.json", config)

    return _write(
        Path(out), tuned, names, lambda n: tuned[n].float() - _grown(base, tuned, n), end, shard_bytes
    )


def read_tokenizer(folder: Path):
    """The tokenizer of a folder whose config.json has landmark fields, or None if it has none.

    Raises LcxError if the tokenizer has no token for the landmark.
    """
    from . import longllama

    fields = json.loads((folder / "config.json").read_text("utf-8"))
    if fields.get("mem_freq") is None or fields.get("mem_id") is None:
        return None
    tokenizer = longllama.read_tokenizer(folder, None)
    if fields["mem_id"] not in tokenizer.get_vocab().values():
        raise LcxError(
            f"the tokenizer in {folder.name} has no landmark, which config.json says is token {fields['mem_id']}: "
            "copy the tokenizer files that were saved with the model"
        )
    return tokenizer


def _fitting(base: Weights, other: Weights) -> list[str]:
    """The names of all weights, if base and other have the same, and the same shapes but for added rows."""
    mine, theirs = ([n for n in w.names if not n.endswith("inv_freq")] for w in (base, other))
    for name in sorted(set(mine) ^ set(theirs)):
        has, lacks = (base, other) if name in mine else (other, base)
        raise LcxError(f"{name} is in {has.folder.name} and not in {lacks.folder.name}: they do not fit")
    for name in theirs:
        old, new = base.shape(name), other.shape(name)
        grown = name in EMBEDDINGS and old[1:] == new[1:] and old[0] < new[0]
        if old != new and not grown:
            raise LcxError(
                f"{name} is {list(old)} in {base.folder.name} and {list(new)} in {other.folder.name}: "
                "this is not the base model that the other was made from"
            )
    return theirs


def _grown(base: Weights, other: Weights, name: str) -> Tensor:
    """The base's tensor as new float32, with rows for the tokens that only the other has."""
    weight = base[name].to(torch.float32, copy=True)
    more = other.shape(name)[0] - len(weight)
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(more, -1)]) if more else weight


def _config(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    if fields.get("mem_id") is None:
        file = folder / "added_tokens.json"
        added = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if LANDMARK not in added:
            raise LcxError(
                f"{folder.name} names no landmark: added_tokens.json with {LANDMARK!r}, or mem_id in config.json, is missing"
            )
        fields["mem_id"] = added[LANDMARK]
    for name in ("dtype", "torch_dtype"):
        fields.pop(name, None)
    return LANDMARK_FIELDS | fields | {"dtype": "float32"}


def _expected_total(diff: Weights) -> float:
    file = diff.folder / CHECKSUM
    if file.is_file():
        try:
            return float(file.read_text())
        except ValueError as e:
            raise CorruptFileError(f"{file} holds no number: fetch it again") from e
    if diff.shape(EMBEDDINGS[0]) == RELEASED_ROWS:
        return RELEASED_TOTAL
    raise LcxError(
        f"{diff.folder.name} has no {CHECKSUM} and is not the released one: recover it with --no-check, unchecked"
    )


def _total(sums: dict[str, Tensor]) -> float:
    def place(name: str) -> tuple[int, int, int]:
        outer, inner = ([i for i, part in enumerate(parts) if part in name] for parts in (_OUTER, _INNER))
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
        return max(outer, default=len(_OUTER)), layer, max(inner, default=len(_INNER))

    total = torch.zeros(())
    for name in sorted(sums, key=place):
        total = total + sums[name]
    return total.item()


def _inv_freq(config: dict[str, Any]) -> Tensor:
    d = config["hidden_size"] // config["num_attention_heads"]
    return 1.0 / config.get("rope_theta", 10000.0) ** (torch.arange(0, d, 2).float() / d)


def _write(
    out: Path,
    like: Weights,
    names: list[str],
    tensor: Callable[[str], Tensor],
    end: Callable[[Path, dict[str, Tensor]], None],
    shard_bytes: int,
) -> Path:
    """The folder `out` with tensor(name) for each name, in shards, and the tokenizer of `like`; all of it or nothing.

    end gets the folder and the sum of each tensor before the folder gets its name.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    from .figures.display import static

    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LcxError(f"{out} is in use: give a new folder")
    shards, room = [[]], shard_bytes
    for name in names:
        size = 4 * math.prod(like.shape(name))
        if size > room and shards[-1]:
            shards, room = [*shards, []], shard_bytes
        shards[-1].append(name)
        room -= size
    sums, where = {}, {}
    with (
        staging(out.parent) as part,
        tqdm(total=len(names), disable=static(), unit="tensor", leave=False) as bar,
    ):
        folder = part / "model"
        folder.mkdir()
        for i, shard in enumerate(shards, 1):
            file, tensors = f"model-{i:05}-of-{len(shards):05}.safetensors", {}
            for name in shard:
                tensors[name] = tensor(name)
                sums[name], where[name] = tensors[name].sum(), file
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
        size = sum(4 * math.prod(like.shape(name)) for name in names)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}
        )
        for name in _COPIED:
            if (like.folder / name).is_file():
                shutil.copyfile(like.folder / name, folder / name)
        end(folder, sums)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    return out
