"""What landmark attention costs: the formulations agree, the figures are measured, the committed ones are within budget."""

from pathlib import Path

import pytest
import torch

import lcx
from lcx import measure
from lcx.errors import LcxError
from lcx.measure import landmark_cost as cost


@pytest.mark.parametrize("length", [48, 53])
def test_the_eager_formulation_is_the_definition(length, monkeypatch):
    monkeypatch.setattr(cost, "BLOCK", 16)
    given = cost.inputs(length, 2, 8)

    def definition(q, k, v, block_size):
        return lcx.grouped_softmax(q @ k.mT * 8**-0.5, block_size) @ v

    true = cost.both_ways(definition, *given)
    assert (
        cost._difference(cost.both_ways(cost.scatter_attention, *given), true) < 1e-6
    )  # its softmax is float32
    assert cost._difference(cost.both_ways(cost.ours, *given), true) < 1e-5
    assert cost._difference(cost.both_ways(cost.sdpa, *given), true) > 0.1, (
        "plain attention is something else"
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_the_measurement_at_small_size(monkeypatch):
    monkeypatch.setattr(cost, "LENGTH", 512)
    monkeypatch.setattr(cost, "LENGTHS", (512,))
    monkeypatch.setattr(cost, "REPEATS", 1)
    monkeypatch.setattr(cost, "THREADS", 1)
    threads = torch.get_num_threads()
    made = cost.landmark_cost()
    assert torch.get_num_threads() == threads
    assert made["relative_difference"] < 1e-5
    assert made["peak_mib"]["scatter"] > 2 * made["peak_mib"]["lcx"] > 0
    assert made["by_length"] == [{"tokens": 512, "peak_mib": made["peak_mib"]["lcx"]}]
    assert made["share_of_scatter_memory"] == pytest.approx(
        made["peak_mib"]["lcx"] / made["peak_mib"]["scatter"], abs=1e-3
    )
    assert all(len(times) == 1 and times[0] > 0 for times in made["seconds"].values())


def test_the_committed_measurement_is_within_budget():
    measured = lcx.result("landmark-cost")
    assert measured["length"] == 2048 and measured["threads"] == 2 and measured["relative_difference"] < 1e-5
    assert measured["times_sdpa"]["lcx"] <= 5 < measured["times_sdpa"]["scatter"]
    assert measured["share_of_scatter_memory"] <= 1 / 5
    peaks = {row["tokens"]: row["peak_mib"] for row in measured["by_length"]}
    assert peaks[8192] < 2.3 * peaks[4096] < 2.3 * 2.3 * peaks[2048], (
        "memory grows with the tokens, not their square"
    )


def test_kernels_are_compared_row_by_row():
    ways = {"kernel": cost.ours, "flash": cost.sdpa, "pytorch": cost.pytorch_form}
    rows = cost.compare_kernels(ways, (128, 192), (16,), 2, "cpu", torch.bfloat16, 2)
    assert [(r["way"], r["tokens"]) for r in rows] == [(w, n) for n in (128, 192) for w in ways]
    assert all(r["ms"] > 0 and r["peak_bytes"] is None for r in rows)
    assert rows[0]["relative_difference"] == 0 and "relative_difference" not in rows[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_measurement_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cost, "GPU_LENGTHS", (512,))
    made = cost.landmark_kernel()
    assert len(made["rows"]) == 6 and len(made["ratios"]) == 2
    assert all(r["relative_difference"] < 1e-2 for r in made["rows"] if r["way"] == "kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(LcxError, match="needs a CUDA GPU: run it on one"):
        measure.run("landmark-kernel")
