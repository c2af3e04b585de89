"""Published recipes as presets of `lcx train cream --preset NAME`: the options that each one sets.

cream-released-*  Llama-2-7B, window 4,096 (CREAM, Wu et al. 2024; scripts/run_CREAM.sh and the DeepSpeed settings beside it):
                  1,000 steps of 32 rows, AdamW as transformers sets it, 2e-5 after 10 steps of warm-up with linear
                  decay to 0, bf16, gradient checkpointing. The script takes factor and RoPE scaling as arguments; sigma
                  is 3, clipped and floored; its YaRN is the harmonic blend. Design and middle are drawn for each row
                  here, the release draws the design once for 3,000 rows.
cream-covering-*  The same, but a truncated Gaussian with sigma 3/8 of the factor, which leaves no distance untrained. Not the
                  paper's; the sigma is the release's 3 at 32k.
cream-chat-*      Llama-2-7B-Chat and conversations (scripts/run_CREAM_chat.sh): 100 steps, no warm-up. The release took the
                  loss on all tokens; here data with messages have it on the assistant's.
pose-*            LLaMA-7B, window 2,048 (PoSE, Zhu et al. 2023, section 3; script/run_train_skipos.sh): 1,000 steps of 64 rows, as
                  above, in fp16 there.

All train all weights at 2e-5, the default of `lcx train`; LoRA keeps its own learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from .errors import LcxError

_COMMON = {
    "steps": 1000,
    "warmup_steps": 10,
    "lr_schedule": "linear",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "bf16": True,
    "gradient_checkpointing": True,
}
_CREAM = _COMMON | {"rows": 32, "batch_size": 16, "sampler": "cream", "released": True}
_POSE = _COMMON | {"rows": 64, "batch_size": 8, "sampler": "pose"}
_SCALINGS = {"linear": "linear", "yarn": "yarn_harmonic"}

LISTED = {
    "cream-released-{32k,64k,128k,256k}-{linear,yarn}": "the paper's, for Llama-2-7B (window 4,096), sigma 3 as released",
    "cream-covering-{32k,64k,128k,256k}-{linear,yarn}": "the same with a sigma that leaves no distance untrained",
    "cream-chat-32k-{linear,yarn}": "the paper's, for Llama-2-7B-Chat and conversations",
    "pose-{16k,32k,96k,128k}-{linear,yarn}": "PoSE's, for LLaMA-7B (window 2,048)",
}
PRESETS: dict[str, dict[str, Any]] = {
    f"{kind}-{length}k-{short}": changes | {"factor": length * 1024 // window, "scaling": scaling}
    for kind, changes, window, lengths in (
        ("cream-released", _CREAM, 4096, (32, 64, 128, 256)),
        ("cream-covering", _CREAM | {"released": False}, 4096, (32, 64, 128, 256)),
        ("cream-chat", _CREAM | {"steps": 100, "warmup_steps": 0}, 4096, (32,)),
        ("pose", _POSE, 2048, (16, 32, 96, 128)),
    )
    for length in lengths
    for short, scaling in _SCALINGS.items()
}


def recipe(name: str, given: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
    """The options of preset `name`, those in `given` before them; batches of all `processes` make the recipe's rows of a step.

    Raises LcxError for an unknown name, and if no number of batches makes the rows.
    """
    if name not in PRESETS:
        raise LcxError(f"no preset {name!r}: use one of {', '.join(LISTED)}")
    options = PRESETS[name] | given
    rows = options.pop("rows")
    if "batch_size" not in given:
        options["batch_size"] = gcd(options["batch_size"], rows // processes)
    if "gradient_accumulation" not in given:
        count = options["batch_size"] * processes
        if not count or rows % count:
            raise LcxError(
                f"preset {name} has {rows} rows in a step, which {processes} processes with batches of "
                f"{options['batch_size']} cannot make: give --batch-size and --gradient-accumulation"
            )
        options["gradient_accumulation"] = rows // count
    return options
