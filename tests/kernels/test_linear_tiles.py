"""The Hopper linear kernel's tile of tokens by its layout: what is chosen against what was measured. No GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.fake_gpu import H200
from tetris.autotune.problems import fresh_config
from tetris.bench.cases import random_layout, scaled_weight
from tetris.dispatch import conv2d_launch, linear_launch
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, LinearConfig, LinearProblem
from tetris.kernels.conv2d_paths import choose_conv2d_config, config_for_layout
from tetris.kernels.hopper.linear_clocks import LinearClocks
from tetris.kernels.hopper.pointwise_conv2d import as_linear
from tetris.kernels.linear_paths import choose_linear_config, fastest_wide, untuned_linear, wide_schedule, wide_tiles
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.reordering import reorder

CLOCKS_PER_US = 1700.0
MEASURED = {
    (512, 4096, 16384, "reordered"): {128: 34.3, 256: 41.4},
    (512, 4096, 16384, "random"): {128: 42.4, 256: 38.2},
    (8192, 4096, 1024, "reordered"): {128: 38.8, 256: 44.6},
    (8192, 4096, 1024, "random"): {128: 49.7, 256: 41.6},
    (512, 4096, 4096, "reordered"): {128: 21.1, 256: 25.9},
    (512, 4096, 4096, "random"): {128: 17.7, 256: 23.6},
    (1024, 4096, 4096, "random"): {128: 25.4, 256: 25.5},
    (8192, 1024, 4096, "reordered"): {128: 44.1, 256: 40.3},
    (8192, 4096, 4096, "random"): {128: 177.2, 256: 139.5},
}
"""(tokens, inputs, outputs, layout): us by tokens of a task; 27 % of 64 x 64 kept, H200, cold L2."""


def layout_of(kind: str, shape: tuple[int, int]) -> BlockLayout:
    """As the tuning bench makes them."""
    if kind == "random":
        return random_layout(shape, (64, 64), 0.27).without_empty_rows()
    return reorder(scaled_weight(shape, 0.5), block=(64, 64), sparsity=0.73, method="sort").layout.without_empty_rows()


def problem_of(tokens: int, layout: BlockLayout) -> LinearProblem:
    return LinearProblem(tokens, layout.shape[1], layout.shape[0], layout.block, "float16", layout.n_blocks)


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_tile_that_was_measured_to_be_faster_is_chosen(case: tuple[int, int, int, str]) -> None:
    tokens, inputs, outputs, kind = case
    layout = layout_of(kind, (outputs, inputs))
    problem = problem_of(tokens, layout)
    config, schedule = fastest_wide(problem, H200, layout.indptr, layout.indices)
    assert MEASURED[case][config.tile_tokens] <= 1.01 * min(MEASURED[case].values())
    assert schedule.clocks == pytest.approx(CLOCKS_PER_US * MEASURED[case][config.tile_tokens], rel=0.15)
    again = wide_schedule(problem, config, layout.indptr, layout.indices, H200.sm_count)
    assert all(torch.equal(a, b) for a, b in zip(schedule.tensors, again.tensors)), "a config and a layout give one"


def test_every_way_to_a_layer_sees_the_same_choice() -> None:
    for kind in ("reordered", "random"):
        layout = layout_of(kind, (1024, 4096))
        problem = problem_of(8192, layout)
        config, _ = untuned_linear(problem, H200, layout.indptr, layout.indices)
        launch = linear_launch(problem, layout.indptr, layout.indices, device=H200)
        values = torch.zeros(layout.n_blocks, 64, 64, dtype=torch.float16)
        layer = BlockSparseLinear(4096, 1024, (64, 64), layout.n_blocks, values=values, layout=layout)
        assert launch.config == config.to_key() == fresh_config(layer, problem, H200).to_key()
    assert choose_linear_config(problem, H200) == choose_linear_config(problem, H200), "and a rule without a layout"


def test_few_tokens_take_small_tiles() -> None:
    layout = layout_of("random", (1024, 4096))
    for tokens in (17, 128):
        config, _ = fastest_wide(problem_of(tokens, layout), H200, layout.indptr, layout.indices)
        assert config.tile_tokens == 128


def test_where_few_blocks_are_kept_tasks_are_small() -> None:
    sparse = random_layout((4096, 25088), (64, 64), 0.04).without_empty_rows()
    assert wide_tiles(problem_of(4096, sparse)) == [128]
    assert wide_tiles(problem_of(8192, random_layout((1024, 4096), (64, 64), 0.27))) == [128, 256]


def test_where_memory_takes_longest_tasks_keep_the_order_of_the_pixels() -> None:
    """Programs that run at the same time read the same pixels: no later round reads them from memory again."""
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[0, :10] = mask[1, :4] = mask[2, :2] = mask[3, :1] = True
    layout = BlockLayout.from_mask(mask, (256, 1024), (64, 64))
    problem = problem_of(128 * 14 * 14, layout)
    config = LinearConfig(kernel="hopper", tile_tokens=256)
    schedule = wide_schedule(problem, config, layout.indptr, layout.indices, H200.sm_count)
    first = schedule.tasks[0, :, 0]
    assert first.sort().values.equal(torch.arange(66).repeat_interleave(2).int() * 256)


def test_a_pointwise_convolution_chooses_by_its_layout_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetris.dispatch.device_info", lambda device: H200)
    layout = random_layout((256, 1024), (64, 64), 0.27).without_empty_rows()
    problem = Conv2dProblem(128, 1024, 256, 14, 14, (1, 1), (1, 1), (0, 0), (1, 1), (64, 64), "float16", 17)
    lists = (layout.indptr, layout.indices)
    expected, _ = fastest_wide(as_linear(problem), H200, *lists)
    chosen = config_for_layout(choose_conv2d_config(problem, H200), problem, H200, *lists)
    launch = conv2d_launch(problem, *lists)
    layer = BlockSparseConv2d(
        1024, 256, (1, 1), (64, 64), layout.n_blocks, (1, 1), (0, 0), (1, 1),
        values=torch.zeros(layout.n_blocks, 1, 64, 64), layout=layout,
    )  # fmt: skip
    assert chosen.tile_pixels == expected.tile_tokens
    assert launch.config == chosen.to_key() == fresh_config(layer, problem, H200).to_key()
    other = replace(chosen, tile_w=128 + 256 - chosen.tile_w).to_key()
    assert conv2d_launch(problem, *lists, key=other).config == other, "a tuned config is taken as it is"
    unsupported = Conv2dConfig(kernel="hopper_linear", tile_w=64).to_key()
    assert conv2d_launch(problem, *lists, key=unsupported).config == chosen.to_key()


def test_clocks_grow_with_what_a_launch_must_do() -> None:
    clocks = LinearClocks()
    assert clocks.of_launch(1000, 0, 0) == pytest.approx(clocks.launch + 1000), "one bound alone"
    assert clocks.of_launch(1000, 1000 * clocks.together_rate, 0) > clocks.launch + 1000, "two that are near"
    small, large = clocks.part_costs(128), clocks.part_costs(256)
    assert large.synchronise > small.synchronise and large.merge == 2 * small.merge, "cutting large tiles costs more"
    assert clocks.of_stages(8, 8, 64, 1, 256) < 2 * clocks.of_stages(8, 8, 64, 1, 128), "they share the weights"
    assert clocks.of_stages(8, 16, 32, 2, 128) >= clocks.of_stages(8, 16, 32, 1, 128), "narrow tiles are more rows"
