"""The one dial of every notebook: how much to compute, where, and in which dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .errors import UnknownProfileError

# name: (what it is for, the time a notebook may take with it)
PROFILES = {
    "smoke": ("tests: the smallest run that still shows the lesson", "40 s on 2 CPU cores"),
    "book": ("the published page", "5 min on 2 CPU cores"),
    "colab": ("one small GPU such as a T4", "15 min on a T4"),
    "full": ("measured results, committed as data", "a large GPU, no limit"),
}


@dataclass(frozen=True)
class Profile:
    """What a notebook should do here: `name`, torch `device` ("cpu", "cuda") and `dtype`."""

    name: str
    device: str
    dtype: Any  # torch.dtype

    def pick(self, *, smoke: Any, book: Any, colab: Any = None, full: Any = None) -> Any:
        """The value for this profile. `colab` falls back to `book`, and `full` to `colab`."""
        colab = book if colab is None else colab
        full = colab if full is None else full
        return {"smoke": smoke, "book": book, "colab": colab, "full": full}[self.name]

    def __str__(self) -> str:
        return f"profile {self.name} on {self.device}, {str(self.dtype).removeprefix('torch.')}\n{PROFILES[self.name][0]} ({PROFILES[self.name][1]})"


def default_dtype(device: str):
    """float32 on CPUs (most have no bf16 instructions), bfloat16 from Ampere on, float16 on older GPUs (T4)."""
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return torch.float32


def profile(name: str = "auto") -> Profile:
    """Resolve the dial. "auto" reads the environment variable LCX_PROFILE, then looks for a GPU.

    Raises UnknownProfileError for a name that is not "auto", "smoke", "book", "colab" or "full".
    """
    import torch

    if name == "auto":
        name = os.environ.get("LCX_PROFILE") or ("colab" if torch.cuda.is_available() else "book")
    if name not in PROFILES:
        raise UnknownProfileError(f"unknown profile {name!r}: use one of auto, {', '.join(PROFILES)}")
    # The published page and the tests are made on a CPU, so that anyone can make them again.
    device = "cuda" if torch.cuda.is_available() and name in ("colab", "full") else "cpu"
    return Profile(name, device, default_dtype(device))
