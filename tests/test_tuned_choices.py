"""What a layer runs that nobody tuned: the package's choice for this or a similar problem, or the analytic one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.fake_gpu import A100, H200
from tetris import dispatch, tuned_choices
from tetris.bench.cases import random_layout
from tetris.dispatch import conv2d_launch, linear_launch
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.conv2d_paths import choose_conv2d_config
from tetris.tuned_choices import Entry, shipped_choice

CONV = Conv2dProblem(32, 256, 256, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), (64, 64), "float16", 8)
LINEAR = LinearProblem(8192, 4096, 4096, (64, 64), "float16", 1106)
TILE = Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=4, tile_k=32)
PORTABLE = LinearConfig(tile_tokens=64, num_stages=3)
LAYOUTS = {
    Conv2dProblem: random_layout((256, 256), (64, 64), 0.5).without_empty_rows(),
    LinearProblem: random_layout((4096, 4096), (64, 64), 0.27).without_empty_rows(),
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[DeviceInfo], None]:
    """Ships a table of two choices and says which GPU there is."""
    conv = Entry(H200.name, H200.capability, H200.triton_version, CONV, TILE, 9.0)
    linear = Entry(H200.name, H200.capability, H200.triton_version, LINEAR, PORTABLE, 9.0)
    monkeypatch.setattr(tuned_choices, "table_entries", lambda: (conv, linear))
    shipped_choice.cache_clear()
    yield lambda device: monkeypatch.setattr(dispatch, "device_info", lambda where: device)
    shipped_choice.cache_clear()


def conv_config(problem: Conv2dProblem = CONV, **options: object) -> Conv2dConfig:
    layout = LAYOUTS[Conv2dProblem]
    return Conv2dConfig.from_key(conv2d_launch(problem, layout.indptr, layout.indices, **options).config)  # type: ignore[arg-type]


def linear_config(problem: LinearProblem = LINEAR) -> LinearConfig:
    layout = LAYOUTS[LinearProblem]
    return LinearConfig.from_key(linear_launch(problem, layout.indptr, layout.indices).config)


def test_fresh_layers_run_the_shipped_choice(on) -> None:
    on(H200)
    assert conv_config() == TILE and linear_config() == PORTABLE


@pytest.mark.parametrize(
    "problem", [replace(CONV, batch=40), replace(CONV, n_blocks=12), replace(CONV, dtype="bfloat16")], ids=str
)
def test_similar_problems_run_it_too(on, problem: Conv2dProblem) -> None:
    on(H200)
    assert conv_config(problem) == TILE


@pytest.mark.parametrize("device", [replace(H200, name="NVIDIA H100 80GB HBM3"), replace(H200, triton_version="3.7.1")])
def test_relatives_of_the_gpu_run_it_too(on, device: DeviceInfo) -> None:
    on(device)
    assert conv_config() == TILE and linear_config() == PORTABLE


@pytest.mark.parametrize(
    "problem", [replace(CONV, batch=128), replace(CONV, height=7, width=7), replace(CONV, stride=(2, 2))], ids=str
)
def test_others_run_the_analytic_choice(on, problem: Conv2dProblem) -> None:
    on(H200)
    assert conv_config(problem) == choose_conv2d_config(problem, H200) != TILE


def test_other_gpus_run_the_analytic_choice(on) -> None:
    on(A100)
    assert conv_config() == choose_conv2d_config(CONV, A100)
    assert linear_config().kernel == "portable" and linear_config() != PORTABLE


def test_pooling_is_another_problem(on) -> None:
    on(H200)
    assert conv_config(max_pool=True) == choose_conv2d_config(CONV, H200, max_pool=True)


def test_a_layer_s_own_choice_wins(on) -> None:
    on(H200)
    mine = replace(TILE, tile_n=16)
    assert conv_config(key=mine.to_key()) == mine


def test_a_choice_that_its_kernel_refuses_is_not_taken(on, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour's tile need not fit."""
    on(H200)
    huge = replace(TILE, tile_n=64, tile_h=32, tile_w=32)
    entry = Entry(H200.name, H200.capability, H200.triton_version, CONV, huge, 9.0)
    monkeypatch.setattr(tuned_choices, "table_entries", lambda: (entry,))
    assert conv_config() == choose_conv2d_config(CONV, H200)


def test_a_look_up_reads_the_tables_once(on, monkeypatch: pytest.MonkeyPatch) -> None:
    on(H200)
    reads: list[int] = []
    monkeypatch.setattr(tuned_choices, "table_entries", lambda: reads.append(1) or ())
    for _ in range(3):
        conv_config(replace(CONV, batch=33))
    assert len(reads) == 1
