"""Training in processes of their own: two of them together, and one that is killed and started again. All on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.test_train import make_tiny

pytestmark = pytest.mark.slow
SECONDS = 600  # for one run; a process that waits for one that is gone would hang
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STEPS = 12

# What `lcx train focused` leaves out: gradients, and the weights of every process.
WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments
import lcx
from lcx.train import CrossBatchTrainer, Documents, collate, constant, packs

folder, out, accumulate = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model, tokenizer = lcx.load(folder, device="cpu")
ids = tokenizer((folder / "text.txt").read_text()).input_ids
arguments = TrainingArguments(
    str(out / "unused"), use_cpu=True, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, max_grad_norm=0.0,
    gradient_accumulation_steps=accumulate, remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True,
)
rank = arguments.process_index

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step == 0:
            grads = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
            save_file(grads, out / f"gradient{rank}.safetensors")

with lcx.FocusedAttention((1,), 16)(model):
    CrossBatchTrainer(
        model=model, args=arguments, train_dataset=Documents([ids], 16, 4), data_collator=collate,
        contexts=packs(4, constant(3)), callbacks=[Keep()],
    ).train()
weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
save_file(weights, out / f"weights{rank}.safetensors")
"""

# `lcx train cream`, and what every process has read and ended with.
CREAM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import Trainer
from lcx.finetune import finetune
from lcx.finetune_cream import CreamSettings

folder, out, accumulate = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
read, compute_loss, train = [], Trainer.compute_loss, Trainer.train

def note(self, model, inputs, *args, **kwargs):
    read.append(torch.stack([inputs["input_ids"], inputs["position_ids"]]))
    return compute_loss(self, model, inputs, *args, **kwargs)

def keep(self, *args, **kwargs):
    train(self, *args, **kwargs)
    end = {n: p.detach().contiguous() for n, p in self.model.named_parameters()}
    save_file(end | {"read": torch.stack(read)}, out / f"end{self.args.process_index}.safetensors")

Trainer.compute_loss, Trainer.train = note, keep
finetune(
    CreamSettings(
        str(folder), (str(folder / "text.txt"),), steps=4, batch_size=2, gradient_accumulation=accumulate,
        learning_rate=3e-3, factor=4, lr_schedule="linear", warmup_steps=1,
    ),
    out / "checkpoint",
)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def start(*args: object) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LCX_STATIC": "1"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, **quiet)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all it has started."""
    for p in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        p.kill()
    process.communicate()


def run(*args: object) -> str:
    process = start(*args)
    try:
        out, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"no end after {SECONDS} s", pytrace=False)
    assert process.returncode == 0, out
    return out


def command(tiny, out, *more: object) -> list[object]:
    options = ["--data", tiny / "text.txt", "--window", 16, "--memory-layers", 1, "--learning-rate", "3e-3"]
    options += ["--steps", STEPS, "--save-steps", 3, "--schedule", "sampled", "--range", "1,3"]
    return ["-m", "lcx", "train", "focused", tiny, "--out", out, *options, *more]


def killed_after_a_checkpoint(args: list[object], out) -> None:
    process, until = start(*args), time.monotonic() + SECONDS
    while not (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.01)
    kill(process)
    assert (out / "checkpoints").is_dir() and not (out / "card.json").exists()


def losses(out) -> list[float]:
    return [loss for _, loss in json.loads((out / "card.json").read_text())["train_loss"]]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process that computes two batches in each step, never interrupted."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(*command(tiny, out, "--batch-size", 2, "--gradient-accumulation", 2))
    assert len(losses(out)) == STEPS
    return out


def test_killed_and_started_again_ends_in_the_same_weights(tiny, alone, tmp_path):
    args = command(tiny, tmp_path / "out", "--batch-size", 2, "--gradient-accumulation", 2)
    killed_after_a_checkpoint(args, tmp_path / "out")
    run(*args)
    assert losses(tmp_path / "out") == losses(alone)
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", alone)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_processes_killed_and_started_again_train_as_one_that_accumulates(tiny, alone, tmp_path):
    args = [*TWO, *command(tiny, tmp_path / "out", "--batch-size", 2)]
    killed_after_a_checkpoint(args, tmp_path / "out")
    said = run(*args)
    assert said.count(f"at step {STEPS}") == 1, said  # one process speaks
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), abs=1e-4)
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, tmp_path / "out"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["settings"]["processes"] == 2
    assert card["tokens"] == json.loads((alone / "card.json").read_text())["tokens"]


def test_both_processes_hold_the_gradient_of_the_whole_batch_and_the_same_weights(tiny, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    for name, launcher, accumulate in (("one", [], 2), ("two", TWO, 1)):
        (tmp_path / name).mkdir()
        run(*launcher, tmp_path / "worker.py", tiny, tmp_path / name, accumulate)
    first, second = (load_file(tmp_path / "two" / f"weights{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.isfinite(w).all() for w in first.values())
    of_one = load_file(tmp_path / "one" / "gradient0.safetensors")
    for rank in (0, 1):
        gradient = load_file(tmp_path / "two" / f"gradient{rank}.safetensors")
        assert gradient.keys() == of_one.keys()
        for name, g in of_one.items():
            torch.testing.assert_close(gradient[name], g, rtol=1e-4, atol=1e-7)


def test_two_processes_read_the_rows_and_labels_of_one(tiny, tmp_path):
    (tmp_path / "cream.py").write_text(CREAM)
    for name, launcher, accumulate in (("one", [], 2), ("two", TWO, 1)):
        (tmp_path / name).mkdir()
        run(*launcher, tmp_path / "cream.py", tiny, tmp_path / name, accumulate)
    one, *two = (
        load_file(tmp_path / end)
        for end in ("one/end0.safetensors", "two/end0.safetensors", "two/end1.safetensors")
    )
    read, *parts = (end.pop("read") for end in (one, *two))  # micro-batch, ids and labels, row, token
    assert read.shape == (8, 2, 2, 64) and len(read[:, 1].flatten(0, 1).unique(dim=0)) > 12
    assert torch.equal(
        torch.stack(parts, 1).flatten(0, 1), read
    )  # in a step first one process, then the other
    assert all(torch.equal(two[0][name], weight) for name, weight in two[1].items())
    for name, weight in one.items():
        torch.testing.assert_close(two[0][name], weight, rtol=0, atol=1e-4)
    assert losses(tmp_path / "two/checkpoint") == pytest.approx(losses(tmp_path / "one/checkpoint"), abs=1e-4)
