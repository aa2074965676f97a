"""float64 twins of every operation: what the kernels must compute, written as plainly as possible.

Each twin takes the arguments of its launcher (without the config), unpacks the blocks to a dense weight, converts
everything to float64 and calls torch. They are the oracle of the tests and of ``tetris.verify``; nothing fast here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.errors import TetrisError
from tetris.layout import BlockLayout
from tetris.packing import unpack

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name, element by element; ``gelu`` is the exact (erf) form."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    raise TetrisError(f"activation: wanted one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def finish(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    output_permutation: torch.Tensor | None,
    *,
    dim: int,
) -> torch.Tensor:
    """The epilogue of every operation: activation(y + bias + residual), stored through the output permutation.

    Args:
        y: the sums, output channels (along ``dim``) in block-row order.
        bias: [channels] in block-row order.
        residual: shape and channel order of the stored output.
        output_permutation: channel j of y is stored at channel output_permutation[j].
    """
    if bias is not None:
        y = y + bias.to(y.dtype).reshape([-1 if d == dim % y.dim() else 1 for d in range(y.dim())])
    if output_permutation is not None:
        y = torch.empty_like(y).index_copy_(dim, output_permutation.long(), y)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation)


def dense_weight(
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    shape: tuple[int, int],
    kernel_size: tuple[int, ...] = (),
) -> torch.Tensor:
    """The dense reordered weight of packed blocks; the block shape is the values' last two dimensions."""
    block = (values.shape[-2], values.shape[-1])
    return unpack(values, BlockLayout(shape, block, indptr, indices), kernel_size)


def block_sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    c_out: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """activation(conv2d(x, W) + bias + residual) in float64, W the dense reordered weight; see ``tetris.kernels``."""
    x = x.double()
    if input_permutation is not None:
        x = x.index_select(1, input_permutation.long())
    weight = dense_weight(values.double(), indptr, indices, (c_out, x.shape[1]), kernel_size)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    return finish(y, bias, activation, residual, output_permutation, dim=1)


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W^T + bias + residual) in float64, W the dense reordered weight; see ``tetris.kernels``.

    ``scales`` [out_features]: of quantised values; row o of W is scales[o] times what is stored.
    """
    x = x.double()
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation.long())
    weight = dense_weight(values.double(), indptr, indices, (out_features, x.shape[-1]))
    weight = weight if scales is None else weight * scales.double()[:, None]
    return finish(F.linear(x, weight), bias, activation, residual, output_permutation, dim=-1)


def permute_channels(x: torch.Tensor, permutation: torch.Tensor, *, dim: int) -> torch.Tensor:
    """y[..., j, ...] = x[..., permutation[j], ...] along ``dim``, in float64."""
    return x.double().index_select(dim, permutation.long())
