# @title Set-up: installs lcx where it is missing, and never replaces what is there
import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

if importlib.util.find_spec("lcx") is None:
    spec = os.environ.get("LCX_SPEC", "lcx @ git+{url}")
    keep = {
        d.name: d.version
        for d in distributions()
        if d.name in ("torch", "torchvision", "torchaudio", "numpy")
    }
    pins = Path(tempfile.gettempdir(), "lcx-keep.txt")
    pins.write_text("\n".join(f"{name}=={version}" for name, version in keep.items()))
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(pins), spec]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise RuntimeError(
            f"lcx was not installed ({why}). Run in a terminal: pip install '{spec}', then restart the kernel."
        )
    importlib.invalidate_caches()
import torch

import lcx

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(f'torch {torch.__version__}, GPU: {gpu}, PROFILE "auto" means "{lcx.profile("auto").name}" here')
