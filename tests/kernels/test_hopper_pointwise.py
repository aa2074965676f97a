"""1x1 convolutions on the Hopper linear kernel: which problems, with what, and on a GPU the results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.fake_gpu import A100, H200
from tests.support.moats import nan_outputs
from tests.support.operands import ConvCase, conv2d_operands
from tetris import dispatch, reference
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, LinearProblem
from tetris.kernels.conv2d_paths import choose_conv2d_config, conv2d_refuses
from tetris.kernels.hopper.pointwise_conv2d import as_linear, linear_config, pointwise_schedule, supports
from tetris.tolerances import relative_error, tolerance

POINTWISE = Conv2dProblem(128, 1024, 256, 14, 14, (1, 1), (1, 1), (0, 0), (1, 1), (64, 64), "float16", 17)
CONFIG = Conv2dConfig(kernel="hopper_linear", tile_n=1, tile_h=1, tile_w=128)
CASE = ConvCase(200, 136, (64, 64), (1, 1), padding=(0, 0), batch=3, height=7, width=9)


def test_a_pointwise_convolution_is_a_linear_layer_over_its_pixels():
    assert as_linear(POINTWISE) == LinearProblem(128 * 14 * 14, 1024, 256, (64, 64), "float16", 17)
    assert linear_config(CONFIG).tile_tokens == 128


@pytest.mark.parametrize(
    ("problem", "device", "kernel"),
    [
        (POINTWISE, H200, "hopper_linear"),
        (POINTWISE, A100, "portable"),
        (replace(POINTWISE, batch=8), H200, "hopper"),
        (replace(POINTWISE, c_in=256, c_out=64, height=56, width=56), H200, "hopper"),
        (replace(POINTWISE, kernel_size=(3, 3), padding=(1, 1)), H200, "hopper"),
        (replace(POINTWISE, stride=(2, 2)), H200, "hopper"),
        (replace(POINTWISE, padding=(1, 1)), H200, "hopper"),
        (replace(POINTWISE, block=(16, 16)), H200, "portable"),
    ],
)
def test_kernel_by_problem(problem, device, kernel):
    assert choose_conv2d_config(problem, device).kernel == kernel


@pytest.mark.parametrize(("c_in", "c_out", "size", "pixels"), [
    (1024, 256, 14, 256), (512, 128, 28, 256), (256, 1024, 14, 256), (2048, 512, 7, 128), (64, 256, 56, 128),
])  # fmt: skip
def test_pixels_of_a_task(c_in, c_out, size, pixels):
    problem = replace(POINTWISE, c_in=c_in, c_out=c_out, height=size, width=size)
    config = choose_conv2d_config(problem, H200)
    assert (config.kernel, config.tile_pixels) == ("hopper_linear", pixels)


def test_says_why_it_does_not_support():
    assert supports(POINTWISE, H200, CONFIG) is None
    assert "stride" in (conv2d_refuses(replace(POINTWISE, stride=(2, 2)), H200, CONFIG) or "")
    assert "capability" in (conv2d_refuses(POINTWISE, A100, CONFIG) or "")
    assert "tile_tokens" in (conv2d_refuses(POINTWISE, H200, replace(CONFIG, tile_w=64)) or "")


def test_a_layer_launches_it_with_its_schedule(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "device_info", lambda device: H200)
    operands = conv2d_operands(replace(CASE, c_out=256, c_in=1024), torch.float16, torch.device("cpu"))
    problem = replace(POINTWISE, n_blocks=len(operands["indices"]))
    launch = dispatch.conv2d_launch(problem, operands["indptr"], operands["indices"])
    assert Conv2dConfig.from_key(launch.config).kernel == "hopper_linear" and len(launch.schedule) == 3
    pooled = dispatch.conv2d_launch(problem, operands["indptr"], operands["indices"], max_pool=True)
    assert Conv2dConfig.from_key(pooled.config).kernel == "hopper", "it cannot pool"
    assert choose_conv2d_config(problem, H200, permuted=True).kernel == "hopper", "nor permute as it stores"


def test_its_schedule_covers_all_pixels():
    operands = conv2d_operands(CASE, torch.float16, torch.device("cpu"))
    problem = replace(POINTWISE, batch=3, c_in=136, c_out=200, height=7, width=9)
    schedule = pointwise_schedule(problem, CONFIG, operands["indptr"], operands["indices"], 132)
    records = schedule.tasks.flatten(0, 1)
    assert set(records[records[:, 2] > 0][:, 0].tolist()) == {0, 128}, "189 pixels are two tiles of 128"


@pytest.mark.hopper
@pytest.mark.parametrize("extras", [(), ("bias", "residual")], ids=str)
@pytest.mark.parametrize(("block", "pitch"), [((64, 64), 0), ((32, 32), 8), ((128, 16), 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference(dtype, block, pitch, extras, device, monkeypatch):
    from tetris.kernels.hopper.pointwise_conv2d import block_sparse_conv2d

    case = replace(CASE, block=block, pitch=pitch, extras=extras, activation="relu")
    operands = conv2d_operands(case, dtype, device)
    for tile in (128, 256):
        with nan_outputs(monkeypatch):
            y = block_sparse_conv2d(**operands, config=replace(CONFIG, tile_w=tile))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y, reference.block_sparse_conv2d(**operands)) <= tolerance(dtype)
