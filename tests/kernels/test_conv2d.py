"""The portable block-sparse convolution against its float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.moats import nan_outputs
from tests.support.operands import ConvCase, conv2d_operands, conv2d_problem
from tetris import reference
from tetris.autotune.device import device_info
from tetris.kernels.configs import Conv2dConfig, default_conv2d_config
from tetris.tolerances import relative_error, tolerance

pytestmark = pytest.mark.usefixtures("triton_kernels")

SMALL = Conv2dConfig(tile_n=1, tile_h=4, tile_w=8, tile_k=16)
POINTERS = Conv2dConfig(tile_n=1, tile_h=4, tile_w=8, tile_k=16, descriptors=False)
JOINED = Conv2dConfig(tile_n=1, tile_h=4, tile_w=8, tile_k=32, descriptors=False, permute_first=False)
EVERYTHING = ("bias", "residual", "input", "output")

CASES = [
    (ConvCase(), SMALL),
    (ConvCase(), POINTERS),
    (ConvCase(block=(32, 16)), JOINED),
    (ConvCase(batch=3), Conv2dConfig(tile_n=2, tile_h=2, tile_w=8)),
    (ConvCase(c_out=72, c_in=40, extras=("bias", "residual"), activation="relu"), SMALL),
    (ConvCase(c_out=72, c_in=40, extras=EVERYTHING, activation="silu"), POINTERS),
    (ConvCase(c_out=72, c_in=40, extras=EVERYTHING, activation="gelu"), JOINED),
    (ConvCase(c_out=72, c_in=40, extras=("output", "residual"), activation="relu6"), SMALL),
    (ConvCase(c_out=69, c_in=39), SMALL),
    (ConvCase(c_in=28, pitch=4), SMALL),
    (ConvCase(c_in=28, pitch=3, extras=("input",)), JOINED),
    (ConvCase(stride=(2, 2), extras=()), SMALL),
    (ConvCase(stride=(1, 2), padding=(0, 2), dilation=(2, 1)), POINTERS),
    (ConvCase(dilation=(2, 2), padding=(2, 2)), SMALL),
    (ConvCase(kernel_size=(1, 1), padding=(0, 0)), SMALL),
    (ConvCase(kernel_size=(1, 1), padding=(0, 0), stride=(2, 2), extras=("residual",)), SMALL),
    (ConvCase(kernel_size=(1, 1), padding=(1, 1)), POINTERS),
    (ConvCase(kernel_size=(5, 2), padding=(2, 0)), SMALL),
    (ConvCase(c_out=50, c_in=20, block=(25, 10), kernel_size=(5, 5), padding=(0, 0)), JOINED),
    (ConvCase(c_out=50, c_in=20, block=(25, 10), padding=(0, 0)), SMALL),
    (ConvCase(c_in=3, block=(32, 2)), JOINED),
    (ConvCase(c_in=1, block=(32, 1)), JOINED),
    (ConvCase(), Conv2dConfig(tile_h=4, tile_w=8, tile_out=16, group_rows=3)),
    (ConvCase(c_out=75, block=(25, 16)), Conv2dConfig(tile_h=4, tile_w=8, tile_out=16)),
    (ConvCase(batch=0), SMALL),
]


def check(
    case: ConvCase,
    config: Conv2dConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    allow_tf32: bool = False,
) -> None:
    """Runs it (None: by the default config) and compares; fails on NaN, a stray store or a wrong memory format."""
    from tetris.kernels.conv2d import block_sparse_conv2d

    operands = conv2d_operands(case, dtype, device)
    config = config or default_conv2d_config(conv2d_problem(case, operands), device_info())
    with nan_outputs(monkeypatch):
        y = block_sparse_conv2d(**operands, allow_tf32=allow_tf32, config=config)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    error = relative_error(y, reference.block_sparse_conv2d(**operands))
    assert error <= tolerance(dtype, allow_tf32)


@pytest.mark.parametrize(("case", "config"), CASES, ids=lambda value: str(value) if isinstance(value, ConvCase) else "")
def test_matches_the_reference(case, config, device, monkeypatch):
    check(case, config, torch.float32, device, monkeypatch)


@pytest.mark.parametrize("config", [SMALL, JOINED], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, config, device, monkeypatch):
    case = ConvCase(c_out=72, c_in=40, extras=("bias", "residual", "output"), activation="gelu")
    check(case, config, dtype, device, monkeypatch)


BLOCKS = [(64, 64), (64, 32), (64, 16), (32, 32), (128, 64), (128, 32), (128, 128), (16, 16), (100, 40)]
GEOMETRIES = [
    {},
    {"stride": (2, 2), "height": 15},
    {"kernel_size": (1, 1), "padding": (0, 0)},
    {"kernel_size": (1, 1), "padding": (0, 0), "stride": (2, 2)},
    {"kernel_size": (5, 5), "padding": (2, 2), "height": 12},
    {"dilation": (2, 2), "padding": (2, 2)},
    {"kernel_size": (7, 7), "padding": (3, 3), "stride": (2, 2), "c_in": 3},
]
CHANNELS = [(256, 192), (200, 136), (133, 75)]
MODES = [
    ("float16", False),
    ("bfloat16", False),
    ("float32", True),
    ("float32", False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_sweep_on_the_gpu(block, geometry, device, monkeypatch):
    """Every block with every geometry; channels, dtypes, batches and optional operands rotate through the grid."""
    turn = BLOCKS.index(block) * len(GEOMETRIES) + GEOMETRIES.index(geometry)
    c_out, c_in = CHANNELS[turn % 3]
    name, allow_tf32 = MODES[turn % 4]
    case = ConvCase(
        block=block,
        activation=("relu", "none", "silu", "gelu", "relu6")[turn % 5],
        extras=(("bias",), EVERYTHING, ("bias", "residual"), ())[turn // 2 % 4],
        **{"c_out": c_out, "c_in": c_in, "height": 14, "width": 13, "batch": (1, 5, 32)[turn // 3 % 3], **geometry},
    )
    dtype = getattr(torch, name)
    check(case, None, dtype, device, monkeypatch, allow_tf32)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 256])
def test_large_images_on_the_gpu(batch, device, monkeypatch):
    case = ConvCase(c_out=64, c_in=64, block=(64, 32), batch=batch, height=56, width=56, activation="relu")
    check(case, None, torch.float16, device, monkeypatch)
