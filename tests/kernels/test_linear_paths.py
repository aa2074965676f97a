"""Which linear kernel runs which problem: pure functions, no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetris.bench.cases import random_layout, reordered_layout
from tetris.kernels.configs import DeviceInfo, LinearProblem
from tetris.kernels.hopper.linear_schedule import make_linear_schedule
from tetris.kernels.linear_paths import (
    choose_linear_config,
    cutting_pays,
    hardly_shares,
    linear_refuses,
    linear_schedule,
    narrow_choice,
    split_config,
)

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
        (replace(LARGE, tokens=512), H200, "hopper"),
        (replace(LARGE, tokens=256), H200, "split"),
        (replace(LARGE, tokens=128), H200, "split"),
        (replace(LARGE, tokens=128), A100, "portable"),
        (replace(LARGE, tokens=128, block=(96, 64)), H200, "portable"),
        (replace(LARGE, tokens=16), H200, "split"),
        (replace(LARGE, tokens=16, block=(128, 16)), H200, "decode"),
        (replace(LARGE, tokens=16), A100, "decode"),
        (replace(LARGE, tokens=1), H200, "vector"),
        (replace(LARGE, tokens=1), A100, "vector"),
    ],
)
def test_kernel_by_problem(problem, device, kernel):
    assert choose_linear_config(problem, device).kernel == kernel


def test_permuted_calls_do_not_move_whole_tiles():
    assert choose_linear_config(LARGE, H200, permuted=True).kernel == "portable"
    assert choose_linear_config(replace(LARGE, tokens=1), H200, permuted=True).kernel == "vector"


def test_fewer_tokens_take_smaller_tiles_so_that_every_multiprocessor_works():
    tiles = [choose_linear_config(replace(LARGE, tokens=tokens), H200).tile_tokens for tokens in (8192, 1024, 512)]
    assert tiles == [256, 128, 128]
    tiles = [choose_linear_config(replace(LARGE, tokens=tokens), H200).tile_tokens for tokens in (256, 128, 64, 20, 16)]
    assert tiles == [128, 64, 32, 32, 16]


def test_few_tokens_are_cut():
    few = LinearProblem(8, 25088, 4096, (64, 64), "float16", 1003)
    assert cutting_pays(few, 16) and not cutting_pays(replace(few, weight_dtype="int8"), 16)
    assert cutting_pays(replace(few, weight_dtype="int8"), 215)
    assert choose_linear_config(few, H200, longest_row=16).kernel == "split"


def test_schedules_by_the_kernel():
    layout = random_layout((512, 8192), (64, 64), 0.3).without_empty_rows()
    problem = LinearProblem(64, 8192, 512, (64, 64), "float16", layout.n_blocks)
    made = {}
    for kernel in ("portable", "split", "hopper"):
        config = replace(split_config(problem, H200), kernel=kernel, tile_tokens=128)
        assert linear_refuses(problem, H200, config) is None
        made[kernel] = linear_schedule(problem, config, layout.indptr, layout.indices, 132)
    assert made["portable"] is None and len(made["split"].tensors) == 2 and len(made["hopper"].tensors) == 3
    decode = replace(config, kernel="decode")
    assert "16 tokens" in (linear_refuses(problem, H200, decode) or "")


@pytest.mark.parametrize(("kept", "expected"), [(0.04, True), (0.10, False), (0.27, False)])
def test_sparse_random_layouts_hardly_share_inputs(kept, expected):
    layout = random_layout((4096, 25088), (64, 64), kept).without_empty_rows()
    schedule = make_linear_schedule(
        layout.indptr, layout.indices, block=(64, 64), tokens=4096, tile_tokens=256, n_programs=132
    )
    assert hardly_shares(schedule) == expected


@pytest.mark.parametrize(
    ("block", "make", "kept", "expected"),
    [
        ((32, 32), random_layout, 0.27, True),
        ((128, 16), random_layout, 0.27, True),
        ((32, 32), random_layout, 0.5, True),
        ((32, 32), random_layout, 0.1, False),  # too few products for a stage's inputs
        ((64, 32), random_layout, 0.27, False),
        ((64, 64), random_layout, 0.27, False),
        ((32, 32), reordered_layout, 0.27, False),
        ((128, 16), reordered_layout, 0.27, False),
    ],
)
def test_small_blocks_that_lie_scattered_take_the_narrow_kernel(block, make, kept, expected):
    layout = make((4096, 4096), block, kept).without_empty_rows()
    problem = LinearProblem(8192, 4096, 4096, block, "float16", layout.n_blocks)
    wide = make_linear_schedule(
        layout.indptr, layout.indices, block=block, tokens=8192, tile_tokens=256, n_programs=132
    )
    narrow = narrow_choice(problem, H200, wide, layout.indptr, layout.indices)
    assert (narrow is not None) == expected
    assert narrow_choice(problem, A100, wide, layout.indptr, layout.indices) is None
