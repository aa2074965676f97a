"""The CPU bench: its rows are right and complete; times are not judged."""

from __future__ import annotations

import argparse

import torch

from tetris.bench import cpu_bench
from tetris.bench.rows import OK


def test_quick_run_measures_every_provider_and_restores_the_threads():
    threads = torch.get_num_threads()
    rows = cpu_bench.run(argparse.Namespace(quick=True, kept=0.27, threads=1))
    assert torch.get_num_threads() == threads
    assert {row.provider for row in rows} == {"dense NCHW", "dense NHWC", "dense", "tetris"}
    assert all(row.status == OK and row.median_us > 0 for row in rows)
    assert {row.extra["layout"] for row in rows} == {"random", "reordered"}
