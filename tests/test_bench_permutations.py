"""The permutations bench: what is retained in which order, and what it writes."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.fake_gpu import H200, clock
from tetris.autotune.compile_job import Job
from tetris.bench import permutations_bench
from tetris.bench.__main__ import main
from tetris.bench.kernel_profile import KernelProfile
from tetris.bench.permutations_bench import CASES, Case, measure, run_time, share_of_gain
from tetris.bench.rows import read_csv
from tetris.models import MLP


def test_sharing_lies_between_the_original_order_and_separate_ones(tmp_path, capsys) -> None:
    small = Case(lambda: MLP(64, 96, 64), (4, 64), 0.7, (8, 8))
    rows = measure("small", small, None, argparse.Namespace(device="cpu", method="sort"))
    retained = {row.provider: row.extra["retained"] for row in rows}
    assert retained["original"] < retained["shared"] < retained["separate"]
    gains = {row.provider: row.extra["gain_kept"] for row in rows}
    assert gains["original"] == 0 and 0 < gains["shared"] < 1 and gains["separate"] == 1
    assert all(row.extra["layers"] == 2 and "network_us" not in row.extra for row in rows)
    assert "search_seconds" in permutations_bench.show(rows)


def test_nothing_gained_is_no_share() -> None:
    assert math.isnan(share_of_gain(0.5, {"separate": 0.5, "original": 0.5}))


def test_a_run_on_trained_weights_writes_rows_and_a_picture(tmp_path) -> None:
    assert main(["permutations", "--device", "cpu", "--quick", "--method", "sort", "--out", str(tmp_path)]) == 0
    assert [row.provider for row in read_csv(tmp_path / "permutations.csv")] == ["original", "shared", "separate"]
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")


def test_every_network_is_pruned_by_its_own_rates() -> None:
    with torch.device("meta"):
        for case in CASES.values():
            layers = permutations_bench.prunable_layers(case.make())
            if isinstance(case.sparsity, list):
                assert len(case.sparsity) == len(layers)


def test_on_a_gpu_permutations_share_of_the_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutations_bench, "graphed", lambda call: call)
    monkeypatch.setattr(permutations_bench, "time_us", clock({"fast": 80.0}))
    found = KernelProfile({"gather_rows_kernel": (1, 20.0), "conv2d_kernel": (1, 80.0)})
    monkeypatch.setattr(permutations_bench, "profile_kernels", lambda run, device: found)
    fast = nn.Linear(4, 4)
    monkeypatch.setattr(permutations_bench, "tetris", SimpleNamespace(convert=lambda pruned, x: fast))
    assert run_time(fast, torch.randn(2, 4)) == {"network_us": 80.0, "permutation_share": 0.2}


def test_on_a_gpu_the_kernels_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def start(jobs: list[Job], device: str) -> SimpleNamespace:
        asked.extend(jobs)
        return SimpleNamespace(wait=lambda seconds: [f"{device}, {seconds} s"])

    monkeypatch.setattr(permutations_bench, "start_workers", start)
    monkeypatch.setattr(permutations_bench, "device_info", lambda device: H200)
    case = Case(lambda: MLP(64, 96, 64), (4, 64), 0.75, {"fc1": (32, 16), "fc2": (64, 64)})
    assert permutations_bench.compile_ahead(case, case.make().eval(), torch.randn(4, 64), 5.0) == ["cpu, 5.0 s"]
    found = [(job.problem.block, job.problem.n_blocks, job.activation, job.bias) for job in asked]
    assert found == [((32, 16), 3, "relu", True), ((32, 64), 2, "none", True)]
