"""The scaling bench around its GPU processes: what it starts and what it makes of their answers."""

from __future__ import annotations

import json
import math
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tetris.bench import tuning_scaling_bench
from tetris.bench.rows import read_csv


def answer(seconds: float, measured: float, problems: int) -> str:
    """What a process prints."""
    walls = {"compile_wall_seconds": seconds - measured, "measure_wall_seconds": measured}
    parts = walls | {"compile_seconds": 30, "workers": 15}
    return "result " + json.dumps(parts | {"seconds": seconds, "problems": problems})


def test_without_the_gpus_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (row,) = tuning_scaling_bench.run(Namespace(suite="vgg16", processes=[1, 2], budget=None, out=tmp_path))
    assert row.status.startswith("skipped") and len(read_csv(tmp_path / "tuning_scaling.csv")) == 1


def test_runs_are_compared_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process takes 40 s; two take 21 and 20; the last run loses a process."""
    texts = iter([(answer(40, 30, 15),), (answer(21, 15, 8), answer(20, 16, 7)), (answer(9, 9, 9),)])
    caches: list[str] = []

    def run(command, env, **options):
        caches.extend((env["TETRIS_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        return SimpleNamespace(stdout="\n".join(["noise", *next(texts)]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(tuning_scaling_bench, "device_name", lambda device: "gpu")
    rows = tuning_scaling_bench.run(Namespace(suite="vgg16", processes=[1, 2, 4], budget=None, out=tmp_path))
    assert [row.extra.get("seconds") for row in rows] == [40, 21, None]
    assert rows[0].speedup == 1 and rows[1].speedup == pytest.approx(40 / 21) and math.isnan(rows[2].speedup)
    assert rows[1].extra["problems"] == "8+7" and rows[1].extra["compile_seconds"] == 60
    assert rows[1].extra["measure_wall_seconds"] == 16
    assert rows[2].status == "failed: 1 of 4 processes ended well"
    assert len(set(caches)) == 6, "every run has an empty store and compiles for itself"
