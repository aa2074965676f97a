"""Which linear kernel runs which problem: pure functions, no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetris.bench.cases import random_layout
from tetris.kernels.configs import DeviceInfo, LinearProblem
from tetris.kernels.hopper.linear_schedule import make_linear_schedule
from tetris.kernels.linear_paths import choose_linear_config, hardly_shares

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
A100 = DeviceInfo("NVIDIA A100", (8, 0), 108, "3.6.0")
LARGE = LinearProblem(8192, 4096, 4096, (64, 64), "float16", 1106)


@pytest.mark.parametrize(
    ("problem", "device", "kernel"),
    [
        (LARGE, H200, "hopper"),
        (LARGE, A100, "portable"),
        (replace(LARGE, dtype="float32"), H200, "portable"),
        (replace(LARGE, block=(16, 16)), H200, "portable"),
        (replace(LARGE, tokens=128), H200, "portable"),
        (replace(LARGE, tokens=16), H200, "decode"),
        (replace(LARGE, tokens=1), A100, "decode"),
    ],
)
def test_kernel_by_problem(problem, device, kernel):
    assert choose_linear_config(problem, device).kernel == kernel


def test_permuted_calls_do_not_move_whole_tiles():
    assert choose_linear_config(LARGE, H200, permuted=True).kernel == "portable"
    assert choose_linear_config(replace(LARGE, tokens=1), H200, permuted=True).kernel == "decode"


def test_fewer_tokens_take_smaller_tiles_so_that_every_multiprocessor_works():
    assert choose_linear_config(LARGE, H200).tile_tokens == 256
    assert choose_linear_config(replace(LARGE, tokens=1024), H200).tile_tokens in (128, 256)
    few = choose_linear_config(replace(LARGE, tokens=512), H200)
    assert (few.kernel, few.tile_tokens) != ("hopper", 256)


@pytest.mark.parametrize(("kept", "expected"), [(0.04, True), (0.27, False), (1.0, False)])
def test_sparse_random_layouts_hardly_share_inputs(kept, expected):
    layout = random_layout((2048, 8192), (64, 64), kept).without_empty_rows()
    schedule = make_linear_schedule(
        layout.indptr, layout.indices, block=(64, 64), tokens=4096, tile_tokens=256, n_programs=132
    )
    assert hardly_shares(schedule) == expected
