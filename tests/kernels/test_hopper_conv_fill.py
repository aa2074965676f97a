"""Which strips of channels the Hopper convolution only fills with their bias. Pure CPU."""

from __future__ import annotations

import pytest
import torch

from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.hopper.conv2d import conv2d_schedule
from tetris.kernels.hopper.fill import fill_tensor, idle_block_rows, idle_rows
from tetris.kernels.hopper.geometry import FILL_PIXELS
from tetris.kernels.hopper.pairing import pair_block_rows


def test_a_row_without_blocks_or_with_one_block_of_zeros_is_idle():
    indptr = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)
    values = torch.zeros(4, 9, 64, 32)
    values[3, 8, 63, 31] = float("nan")
    assert idle_block_rows(indptr, None) == [False, True, False, False]
    assert idle_block_rows(indptr, values) == [True, True, False, False]  # two blocks are not looked at


def test_strips_of_tall_blocks_and_of_pairs():
    assert idle_rows([False, True], 2, None) == ([2, 3], [128, 192])
    indptr = torch.tensor([0, 1, 1, 2, 2, 2], dtype=torch.int32)
    pairs = pair_block_rows(indptr, torch.tensor([0, 0], dtype=torch.int32))
    rows, channels = idle_rows([False, True, False, True, True], 1, pairs)
    assert sorted(channels) == [32, 96, 128]  # the rows that keep a block make a pair of their own
    assert [pairs.indptr[row] == pairs.indptr[row + 1] for row in rows] == [True] * len(rows)


@pytest.mark.parametrize(("channels", "pixels", "steps", "burst"), [([64], 320, 10, 1), ([0, 64], 3200, 10, 20)])
def test_the_stores_are_spread_over_the_steps(channels, pixels, steps, burst):
    fill = fill_tensor(channels, pixels, steps).tolist()
    assert fill == [burst, *channels]
    assert burst * steps * FILL_PIXELS >= len(channels) * pixels


def test_a_layer_without_any_block_is_not_filled():
    problem = Conv2dProblem(8, 64, 64, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (64, 64), "float16", 1)
    layout = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    config = Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=8)
    schedule = conv2d_schedule(*layout, problem, config, 132, "cpu", torch.zeros(1, 9, 64, 64))
    assert len(schedule.fill) == 0 and len(schedule.order) == 2
