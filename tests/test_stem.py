"""The dense first layer with a fused epilogue, in the interpreter or on a GPU, and its layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tetris.errors import ShapeError, UnsupportedError
from tetris.kernels.configs import StemConfig
from tetris.packing import pack_stem, unpack_stem
from tetris.stem import StemConv2d, stem_conv2d
from tetris.tolerances import relative_error, tolerance

CASES = [
    (3, 20, (3, 3), (1, 1), (1, 1), (1, 1), 9, 11),
    (1, 5, (5, 5), (1, 1), (0, 0), (1, 1), 8, 8),
    (3, 64, (7, 7), (2, 2), (3, 3), (1, 1), 17, 15),
    (4, 70, (3, 3), (1, 2), (2, 1), (2, 1), 9, 9),
]


def expected(x, weight, bias, activation, *geometry):
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *geometry)
    return {"relu": F.relu, "silu": F.silu, "none": lambda v: v}[activation](y)


@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_float64(case, activation, device, triton_kernels):
    from tetris.kernels.stem_conv2d import stem_conv2d as launch

    c_in, c_out, size, stride, padding, dilation, height, width = case
    torch.manual_seed(0)
    x = torch.randn(2, c_in, height, width, device=device).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(c_out, c_in, *size, device=device), torch.randn(c_out, device=device)
    bias = None if activation == "none" else bias
    y = launch(
        x, pack_stem(weight), bias, kernel_size=size, stride=stride, padding=padding, dilation=dilation,
        activation=activation, config=StemConfig(tile_pixels=32),
    )  # fmt: skip
    assert relative_error(y, expected(x, weight, bias, activation, stride, padding, dilation)) < tolerance(y.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_on_a_gpu(case, dtype):
    c_in, c_out, size, stride, padding, dilation, height, width = case
    torch.manual_seed(0)
    conv = nn.Conv2d(c_in, c_out, size, stride, padding, dilation).cuda().to(dtype)
    layer, x = (
        StemConv2d.from_dense(conv, "relu"),
        torch.randn(5, c_in, 4 * height, 4 * width, device="cuda", dtype=dtype),
    )
    y = layer(x)
    tf32 = torch.backends.cudnn.allow_tf32
    reference = expected(x, conv.weight, conv.bias, "relu", stride, padding, dilation)
    assert relative_error(y, reference) < tolerance(dtype, tf32)


def test_layer_on_a_cpu_and_its_registration():
    conv = nn.Conv2d(3, 8, 3, padding="same", bias=False)
    layer, x = StemConv2d.from_dense(conv, "relu"), torch.randn(2, 3, 7, 7)
    assert relative_error(layer(x), torch.relu(conv(x))) < tolerance(torch.float32)
    layer.max_pool = True
    assert relative_error(layer(x), F.max_pool2d(torch.relu(conv(x)), 2)) < tolerance(torch.float32)
    assert torch.equal(unpack_stem(layer.weight, 3, (3, 3)), conv.weight)
    arguments = (x, layer.weight, None, [3, 3], [1, 1], [1, 1], [1, 1], "relu", True, False)
    results = torch.library.opcheck(stem_conv2d, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_gradients_are_those_of_the_dense_convolution():
    conv, x = nn.Conv2d(3, 20, 3, 2, 1), torch.randn(2, 3, 9, 11, requires_grad=True)
    layer = StemConv2d.from_dense(conv, "relu").requires_grad_()
    layer.max_pool = True
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    F.max_pool2d(conv(x).relu(), 2).square().sum().backward()
    assert relative_error(found, x.grad) < 1e-5
    assert relative_error(layer.bias.grad, conv.bias.grad) < 1e-5
    assert relative_error(layer.weight.grad, pack_stem(conv.weight.grad)) < 1e-5


def test_only_few_channels_and_zero_padding_are_stems():
    assert StemConv2d.supports(nn.Conv2d(3, 8, 3, padding=1))
    assert not StemConv2d.supports(nn.Conv2d(16, 8, 3))
    assert not StemConv2d.supports(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))
    layer = StemConv2d.from_dense(nn.Conv2d(3, 8, 3))
    with pytest.raises(ShapeError, match="C_IN = 3; got"):
        layer(torch.randn(1, 4, 8, 8))
    with pytest.raises(UnsupportedError, match="convert one"):
        layer(torch.randn(1, 3, 8, 8).half())
