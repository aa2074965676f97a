"""The bench of first convolutions on the CPU."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from tests.support.fake_gpu import clock
from tetris.bench import stem_bench
from tetris.bench.rows import OK, WRONG


def test_a_quick_run_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restored after the test
    monkeypatch.setattr(stem_bench, "time_us", clock({"dense": 30.0, "tetris": 20.0}))
    parser = argparse.ArgumentParser()
    stem_bench.add_arguments(parser)
    rows = stem_bench.run(argparse.Namespace(**vars(parser.parse_args([])), device="cpu", quick=True))
    assert [(row.provider, row.status, row.speedup) for row in rows] == [("dense", OK, 1.0), ("tetris", OK, 1.5)]
    assert math.isnan(rows[0].error) and rows[1].error < 1e-5
    assert rows[0].flop == 2 * 2 * 32 * 32 * 16 * 27 and rows[0].bytes == 4 * 2 * 32 * 32 * (3 + 16)


def test_a_wrong_stem_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_bench, "tolerance", lambda dtype: 0.0)
    dense, ours = stem_bench.measure(stem_bench.QUICK[0], "cpu", torch.float32, 1)
    assert dense.status == OK and dense.median_us > 0
    assert ours.status == WRONG and math.isnan(ours.median_us) and math.isnan(ours.speedup) and ours.error > 0
