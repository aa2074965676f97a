"""The bench of one-byte weights on the CPU."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch

from tests.support.fake_gpu import H200, clock
from tetris.bench import quantized_bench
from tetris.bench.rows import OK, WRONG, read_csv
from tetris.kernels.configs import LinearProblem

PROVIDERS = ["dense", "tetris float32", "tetris int8", "tetris float8_e4m3fn"]


def test_a_quick_run_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_bench, "time_us", clock({"dense": 30.0, "tetris int8": 10.0}, otherwise=20.0))
    parser = argparse.ArgumentParser()
    quantized_bench.add_arguments(parser)
    options = vars(parser.parse_args([]))
    rows = quantized_bench.run(argparse.Namespace(**options, device="cpu", quick=True, out=tmp_path))
    assert len(read_csv(tmp_path / "quantized.csv")) == len(rows)
    assert [row.provider for row in rows] == 2 * PROVIDERS and {row.status for row in rows} == {OK}
    assert [row.speedup for row in rows[:4]] == [1.0, 1.5, 3.0, 1.5]
    plain, int8, float8 = rows[1:4]
    assert max(row.error for row in rows[1:4]) < 1e-5
    assert plain.extra["quantisation"] == 0 < int8.extra["quantisation"] < float8.extra["quantisation"] < 0.04
    weights = round(plain.extra["kept"] * 16) * 64 * 64
    assert plain.bytes - int8.bytes == 3 * weights and int8.bytes == float8.bytes == 4 * 512 + weights


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_bench, "tolerance", lambda dtype: 0.0)
    rows = quantized_bench.measure(quantized_bench.QUICK[0], "cpu", torch.float32, 1)
    assert rows[0].status == OK and {row.status for row in rows[1:]} == {WRONG}
    assert all(math.isnan(row.median_us) and row.error > 0 for row in rows[1:])


@pytest.mark.parametrize("tokens", [1, 16, 128, 8192])
def test_candidates_take_the_problem(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_bench, "device_info", lambda device: H200)
    plain, stored = (
        quantized_bench.tuning_candidates(LinearProblem(tokens, 4096, 4096, (64, 64), "float16", 1106, weights))
        for weights in ("", "int8")
    )
    assert len(set(stored)) == len(stored) >= 3
    assert {config.kernel for config in stored} <= {"decode", "split", "portable", "vector"}
    assert ("hopper" in {config.kernel for config in plain}) == (tokens > 16)
