"""Configs as data and the analytic defaults: pure functions, tested without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tetris.errors import TetrisError
from tetris.kernels.configs import (
    ITEM_SIZE,
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
    conv2d_output_size,
    default_conv2d_config,
    default_linear_config,
    next_power_of_two,
    pixel_tile,
)
from tetris.layout import ceil_div

H200 = DeviceInfo("H200", (9, 0), 132, "3.6.0")
A100 = DeviceInfo("A100", (8, 0), 108, "3.6.0")
RTX4090 = DeviceInfo("RTX 4090", (8, 9), 128, "3.7.1")
MI300 = DeviceInfo("MI300X", (0, 0), 304, "3.7.1", backend="hip")
DEVICES = [H200, A100, RTX4090, MI300]
BLOCKS = [(64, 64), (64, 32), (64, 16), (32, 32), (128, 64), (128, 128), (256, 256), (25, 10), (32, 2), (1, 1)]


def conv_problem(block=(64, 64), dtype="float16", **changes) -> Conv2dProblem:
    problem = Conv2dProblem(128, 512, 512, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), block, dtype, 17)
    return dataclasses.replace(problem, **changes)


@pytest.mark.parametrize("config", [Conv2dConfig(tile_n=4, num_stages=9), LinearConfig(kernel="hopper", tile_k=32)])
def test_keys_return_the_config(config):
    assert type(config).from_key(config.to_key()) == config


@pytest.mark.parametrize("key", ["", "[]", '{"no_such_field": 1}', "{"])
def test_keys_of_another_version_are_refused(key):
    with pytest.raises(TetrisError, match="Conv2dConfig: wanted"):
        Conv2dConfig.from_key(key)


def test_output_size():
    assert conv2d_output_size((28, 29), (3, 5), (1, 2), (1, 2), (1, 1)) == (28, 15)
    assert conv2d_output_size((28, 28), (3, 3), (1, 1), (2, 2), (2, 2)) == (28, 28)


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(n, power):
    assert next_power_of_two(n) == power


@pytest.mark.parametrize(("batch", "height", "width"), [(128, 28, 28), (1, 14, 14), (3, 7, 9), (1, 1, 1000)])
def test_pixel_tiles_waste_no_more_than_any_other_box(batch, height, width):
    def programs(n, h, w):
        return ceil_div(batch, n) * ceil_div(height, h) * ceil_div(width, w)

    box = pixel_tile(batch, height, width, 64)
    assert box[0] * box[1] * box[2] == 64
    powers = [1, 2, 4, 8, 16, 32, 64]
    boxes = [b for b in itertools.product(powers, repeat=3) if b[0] * b[1] * b[2] == 64]
    assert programs(*box) == min(programs(*b) for b in boxes)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", list(ITEM_SIZE))
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_defaults_fit_the_device(block, dtype, device):
    linear = LinearProblem(8192, 4096, 4096, block, dtype, 1000)
    conv, dense = default_conv2d_config(conv_problem(block, dtype), device), default_linear_config(linear, device)
    for config, pixels in ((conv, conv.tile_pixels), (dense, dense.tile_tokens)):
        sizes = (pixels, config.tile_out, config.tile_k)
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        buffers = ceil_div(config.num_stages, 2)
        assert buffers * (pixels + config.tile_out) * config.tile_k * ITEM_SIZE[dtype] <= device.shared_bytes
        assert config.descriptors == (device is H200 and min(block) >= 16)


def test_descriptors_need_aligned_channels_and_stride_one():
    assert default_conv2d_config(conv_problem(), H200).descriptors
    assert not default_conv2d_config(conv_problem(c_in=509), H200).descriptors
    assert not default_conv2d_config(conv_problem(stride=(2, 2)), H200).descriptors
    assert default_conv2d_config(conv_problem(stride=(2, 2), kernel_size=(1, 1)), H200).descriptors
    assert not default_linear_config(LinearProblem(64, 1001, 512, (64, 64), "float16", 9), H200).descriptors


@pytest.mark.parametrize("batch", [1, 2, 16, 128])
def test_small_problems_get_small_tiles(batch):
    problem = conv_problem(batch=batch, height=14, width=14)
    config = default_conv2d_config(problem, H200)
    programs = ceil_div(batch * 14 * 14, config.tile_pixels) * problem.block_rows
    assert programs >= 2 * H200.sm_count or config.tile_pixels == 16


def test_small_blocks_are_joined_without_descriptors():
    config = default_conv2d_config(conv_problem((32, 2), c_in=3, c_out=64, n_blocks=4), H200)
    assert not config.descriptors and config.tile_k == 64  # two blocks a row, 9 taps, 2 channels = 36
    assert default_conv2d_config(conv_problem((64, 16), n_blocks=64), A100).tile_k == 64
