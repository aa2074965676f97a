"""``StemConv2d``: the dense first convolution of a network, with bias and activation in its epilogue.

Three input channels cannot be pruned by blocks, but on a GPU the layer's separate bias and activation passes cost more
than a well-pruned layer further down: on an H200 VGG16's first layer took half of the converted network's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetris.block_sparse_layer import FusedLayer
from tetris.errors import ShapeError, UnsupportedError, describe
from tetris.kernels.configs import StemConfig, conv2d_output_size
from tetris.kernels.cpu.epilogue import finish_
from tetris.kernels.device import device_info
from tetris.layers import pair, supported_padding
from tetris.ops import check_dtypes, directly
from tetris.packing import pack_stem, unpack_stem
from tetris.reference import finish
from tetris.registration import Operation

MOST_CHANNELS = 8
"""Input channels up to which all taps together are a short reduction."""


def run_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    max_pool: bool,
    allow_tf32: bool,
) -> Tensor:
    """pool(activation(conv2d(x, W) + bias)), x [N, C_IN, H, W], for a dense weight [C_OUT, KH * KW * C_IN]."""
    device_info(x.device)
    from tetris.kernels.stem_conv2d import stem_conv2d as launch

    pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    y = launch(
        x.contiguous(memory_format=torch.channels_last), weight, bias, **{k: (v[0], v[1]) for k, v in pairs.items()},
        activation=activation, allow_tf32=allow_tf32, config=StemConfig(),
    )  # fmt: skip
    return F.max_pool2d(y, 2) if max_pool else y


def _stem_cpu(x, weight, bias, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32):
    dense = unpack_stem(weight, x.shape[1], (kernel_size[0], kernel_size[1]))
    y = F.conv2d(x, dense, bias, tuple(stride), tuple(padding), tuple(dilation))
    return finish_(y, None, activation, max_pool=max_pool).contiguous(memory_format=torch.channels_last)


def _stem_shape(x, weight, bias, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32):
    height, width = conv2d_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    height, width = (height // 2, width // 2) if max_pool else (height, width)
    return x.new_empty((x.shape[0], weight.shape[0], height, width)).to(memory_format=torch.channels_last)


def _stem_dense(x, weight, bias, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32):
    """The same function, differentiable; what gradients are taken of."""
    dense = unpack_stem(weight, x.shape[1], (kernel_size[0], kernel_size[1]))
    y = F.conv2d(x, dense, bias, tuple(stride), tuple(padding), tuple(dilation))
    y = finish(y, None, activation, None, None, dim=1)
    return F.max_pool2d(y, 2) if max_pool else y


STEM = Operation(
    "stem_conv2d", run_stem, cpu=_stem_cpu, shape=_stem_shape, dense=_stem_dense, memory_format=torch.channels_last
)
stem_conv2d = STEM.op


class StemConv2d(FusedLayer):
    """y = pool(activation(conv2d(x, W) + bias)) with a dense W and at most 8 input channels; for inference.

    Attributes:
        weight: [C_OUT, KH * KW * C_IN]; see :func:`tetris.packing.pack_stem`.
        bias: [C_OUT] or None.
    """

    pools = True
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        bias: bool = True,
        activation: str = "none",
        max_pool: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.activation, self.max_pool = activation, max_pool
        weight = torch.zeros(out_channels, kernel_size[0] * kernel_size[1] * in_channels)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_channels), requires_grad=False) if bias else None

    @staticmethod
    def supports(conv: nn.Conv2d) -> bool:
        """Whether a convolution has few enough channels and a padding that the kernel knows."""
        if conv.in_channels > MOST_CHANNELS:
            return False
        try:
            supported_padding(conv)
        except UnsupportedError:
            return False
        return True

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, activation: str = "none") -> StemConv2d:
        """The same convolution with a fused epilogue."""
        layer = cls(
            conv.in_channels, conv.out_channels, pair(conv.kernel_size), pair(conv.stride), supported_padding(conv),
            pair(conv.dilation), bias=conv.bias is not None, activation=activation,
        )  # fmt: skip
        layer.weight.data = pack_stem(conv.weight.detach())
        if layer.bias is not None and conv.bias is not None:
            layer.bias.data = conv.bias.detach().clone()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._calls(self, self._forward, x, None)

    def _forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(
                f"StemConv2d: wanted input [N, C_IN, H, W] with C_IN = {self.in_channels}; got {describe(x)}"
            )
        check_dtypes("StemConv2d", x, self.weight)
        convolve = run_stem if directly() else stem_conv2d
        return convolve(
            x, self.weight, self.bias, self.kernel_size, self.stride, self.padding, self.dilation, self.activation,
            self.max_pool, torch.backends.cudnn.allow_tf32,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, activation={self.activation}" + (", max_pool" if self.max_pool else "")
        )

    def arguments(self) -> dict[str, Any]:
        """What the constructor takes, for saving."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "activation",
            "max_pool",
        )
        return {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}
