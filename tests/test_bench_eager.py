"""The bench of what a call costs the CPU."""

from __future__ import annotations

import argparse

import pytest
import torch

from tetris.bench import eager_bench
from tetris.bench.eager_bench import CASES, EagerCase, host_us, kernel_of, layers
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.stem import StemConv2d


def test_a_quick_run_times_both_and_prints_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    eager_bench.add_arguments(parser)
    args = parser.parse_args(["--repeats", "1", "--profile"])
    rows = eager_bench.run(argparse.Namespace(**vars(args), device="cpu", quick=True))
    assert [row.provider for row in rows] == ["dense", "tetris registered", "tetris"] * 3
    assert all(row.median_us > 0 for row in rows)
    assert rows[2].speedup == pytest.approx(rows[0].median_us / rows[2].median_us) and rows[2].extra["kernel"] == "cpu"
    assert "cumulative" in capsys.readouterr().out


def test_layers_are_what_the_case_says() -> None:
    kinds = {"first": StemConv2d, "conv": BlockSparseConv2d, "linear": BlockSparseLinear}
    made = {
        "first": EagerCase("first", "stem", (16, 3), 1, 8),
        "conv": EagerCase("conv", "hopper", (32, 16), 2, 8, 1, (16, 16)),
        "linear": EagerCase("linear", "split", (32, 48), 2, block=(16, 16), permuted=True),
    }
    for name, case in made.items():
        dense, ours, x = layers(case, "cpu", torch.float32)
        assert isinstance(ours, kinds[name]) and ours(x).shape == dense(x).shape and kernel_of(ours, x) == "cpu"
    assert ours.input_permutation is not None and ours.output_permutation is not None
    assert {case.kernel for case in CASES} == {
        "hopper", "hopper_linear", "portable", "stem", "narrow", "split", "decode", "vector"
    }  # fmt: skip


def test_calls_are_counted() -> None:
    called: list[int] = []
    timing = host_us(lambda x: called.append(1), torch.zeros(1), repeats=2, calls=5)
    assert len(called) == 3 + 2 * 5 and timing.repeats == 2 and timing.median_us > 0
