"""Block-sparse operations registered with torch: ``torch.ops.tetris.*``.

Registration (:mod:`tetris.registration`) gives them shapes without data, gradients, launches that are repeated, and an
identity that torch.compile, CUDA graphs and torch.export can keep. A CUDA tensor runs a Triton kernel, a CPU tensor
native dense operations on the kept inputs. Arguments are plain: packed values and their layout, permutations or None, a
config as JSON ("" = analytic default).
The functions ``run_...`` are what the operations do on a GPU; a recorder that is watching has them called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tetris.dispatch import dtype_name
from tetris.errors import UnsupportedError, describe
from tetris.kernels.configs import (
    Conv2dConfig,
    Conv2dProblem,
    DeviceInfo,
    LinearConfig,
    LinearProblem,
    conv2d_output_size,
    default_conv2d_config,
    default_linear_config,
)
from tetris.kernels.conv2d_paths import conv2d_launcher
from tetris.kernels.device import device_info
from tetris.kernels.linear_paths import SCHEDULED, linear_launcher, refuses_weights
from tetris.kernels.recording import watched
from tetris.quantization import LARGEST, dequantize
from tetris.reference import dense_weight, finish
from tetris.registration import Operation

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.lru_cache(maxsize=4096)
def conv2d_config(problem: Conv2dProblem, device: DeviceInfo, key: str) -> Conv2dConfig:
    """The config of a key, or the portable default for the problem; pure, so remembering it is safe."""
    return Conv2dConfig.from_key(key) if key else default_conv2d_config(problem, device)


@functools.lru_cache(maxsize=4096)
def linear_config(problem: LinearProblem, device: DeviceInfo, key: str) -> LinearConfig:
    """The config of a key, or the portable default for the problem; pure, so remembering it is safe."""
    if reason := refuses_weights(problem.weight_dtype, device):
        raise UnsupportedError(f"BlockSparseLinear: {problem.weight_dtype} weights: {reason}; convert with 'int8'")
    return LinearConfig.from_key(key) if key else default_linear_config(problem, device)


def directly() -> bool:
    """Whether to call ``run_...`` and not the operation: a recorder wants to see the kernels."""
    return not torch.compiler.is_compiling() and watched()


def check_dtypes(op: str, x: Tensor, values: Tensor) -> None:
    """Inputs and weights must share one device and, unless the weights are quantised, one supported dtype."""
    fits = x.dtype == values.dtype or values.dtype in LARGEST
    if not fits or x.device != values.device or x.dtype not in DTYPES:
        raise UnsupportedError(
            f"{op}: wanted input and weights on one device in one of float16, bfloat16, float32; "
            f"got input {describe(x)} and weights {describe(values)}; convert one with .to(...) "
            "(under torch.autocast: convert the model to the dtype in which it is to run)"
        )


# -- convolution ------------------------------------------------------------------------------------------------------
def run_conv2d(
    x: Tensor,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    input_permutation: Tensor | None,
    output_permutation: Tensor | None,
    schedule: Sequence[Tensor],
    c_out: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    max_pool: bool,
    allow_tf32: bool,
    config: str,
) -> Tensor:
    """pool(activation(conv2d(x, W) + bias + residual)), W block-sparse (eq. 3).

    Args:
        x: [N, C_IN, H, W], channels_last.
        values, indptr, indices: packed blocks [n_blocks, KH * KW, BLOCK_OUT, BLOCK_IN] and their layout, no empty rows.
        bias: [C_OUT] in block-row order.
        residual: like the output before pooling.
        input_permutation: channel j of the layer reads channel input_permutation[j] of x.
        output_permutation: output channel j of the layer is stored as channel output_permutation[j].
        schedule: the Hopper kernel's offline schedule, empty otherwise.
        max_pool: 2x2 max-pooling of the result; fused where the kernel can.
        config: a :class:`~tetris.kernels.configs.Conv2dConfig` key; "" picks the portable kernel's default.
    Returns:
        [N, C_OUT, H', W'], channels_last, x's dtype.
    Cost: 2 N H' W' n_blocks KH KW BLOCK_OUT BLOCK_IN FLOP.
    """
    device = device_info(x.device)
    problem = Conv2dProblem(
        batch=x.shape[0],
        c_in=x.shape[1],
        c_out=c_out,
        height=x.shape[2],
        width=x.shape[3],
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        block=(values.shape[-2], values.shape[-1]),
        dtype=dtype_name(x.dtype),
        n_blocks=values.shape[0],
    )
    chosen = conv2d_config(problem, device, config)
    extra: dict[str, Any] = {}
    if chosen.kernel == "hopper":
        from tetris.kernels.hopper.schedule import Schedule

        extra = {"max_pool": max_pool, "schedule": Schedule.from_tensors(schedule) if schedule else None}
    elif chosen.kernel == "hopper_linear":
        extra = {"schedule": schedule or None}
    y = conv2d_launcher(chosen.kernel)(
        x.contiguous(memory_format=torch.channels_last),
        values,
        indptr,
        indices,
        bias,
        c_out=c_out,
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        activation=activation,
        residual=residual,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
        allow_tf32=allow_tf32,
        config=chosen,
        **extra,
    )
    return F.max_pool2d(y, 2) if max_pool and "max_pool" not in extra else y


def _conv2d_cpu(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    c_out, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32, config,
):  # fmt: skip
    from tetris.kernels.cpu.conv2d import block_sparse_conv2d as run

    y = run(
        x, values, indptr, indices, bias, c_out=c_out, kernel_size=tuple(kernel_size), stride=tuple(stride),
        padding=tuple(padding), dilation=tuple(dilation), activation=activation, residual=residual,
        input_permutation=input_permutation, output_permutation=output_permutation,
    )  # fmt: skip
    return F.max_pool2d(y, 2) if max_pool else y


def _conv2d_shape(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    c_out, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32, config,
):  # fmt: skip
    height, width = conv2d_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    height, width = (height // 2, width // 2) if max_pool else (height, width)
    return x.new_empty((x.shape[0], c_out, height, width)).to(memory_format=torch.channels_last)


def _conv2d_dense(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    c_out, kernel_size, stride, padding, dilation, activation, max_pool, allow_tf32, config,
):  # fmt: skip
    """The same function through a dense weight, differentiable; what gradients are taken of."""
    if input_permutation is not None:
        x = x.index_select(1, input_permutation)
    weight = dense_weight(values, indptr, indices, (c_out, x.shape[1]), tuple(kernel_size))
    y = F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation))
    y = finish(y, bias, activation, residual, output_permutation, dim=1)
    return F.max_pool2d(y, 2) if max_pool else y


CONV2D = Operation(
    "block_sparse_conv2d", run_conv2d, cpu=_conv2d_cpu, shape=_conv2d_shape, dense=_conv2d_dense,
    memory_format=torch.channels_last,
)  # fmt: skip
block_sparse_conv2d = CONV2D.op


# -- linear -----------------------------------------------------------------------------------------------------------
def run_linear(
    x: Tensor,
    values: Tensor,
    indptr: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    input_permutation: Tensor | None,
    output_permutation: Tensor | None,
    schedule: Sequence[Tensor],
    out_features: int,
    activation: str,
    allow_tf32: bool,
    config: str,
    scales: Tensor | None,
) -> Tensor:
    """activation(x W^T + bias + residual), W block-sparse (eq. 2); x is [..., C_IN], the result [..., C_OUT].

    Arguments as in :func:`run_conv2d`; values are [n_blocks, BLOCK_OUT, BLOCK_IN], of x's dtype or quantised
    (``tetris.quantization``) with fp32 ``scales`` [C_OUT] in block-row order.
    Cost: 2 tokens n_blocks BLOCK_OUT BLOCK_IN FLOP.
    """
    device = device_info(x.device)
    problem = LinearProblem(
        tokens=x.numel() // x.shape[-1],
        in_features=x.shape[-1],
        out_features=out_features,
        block=(values.shape[-2], values.shape[-1]),
        dtype=dtype_name(x.dtype),
        n_blocks=values.shape[0],
        weight_dtype="" if scales is None else dtype_name(values.dtype),
    )
    chosen = linear_config(problem, device, config)
    extra = {"schedule": schedule or None} if chosen.kernel in SCHEDULED else {}
    return linear_launcher(chosen.kernel)(
        x.contiguous(),
        values,
        indptr,
        indices,
        bias,
        out_features=out_features,
        activation=activation,
        residual=residual,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
        allow_tf32=allow_tf32,
        config=chosen,
        **extra,
        **({} if scales is None else {"scales": scales}),
    )


def _linear_cpu(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    out_features, activation, allow_tf32, config, scales,
):  # fmt: skip
    from tetris.kernels.cpu.linear import block_sparse_linear as run

    return run(
        x, values, indptr, indices, bias, out_features=out_features, activation=activation, residual=residual,
        input_permutation=input_permutation, output_permutation=output_permutation, scales=scales,
    )  # fmt: skip


def _linear_shape(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    out_features, activation, allow_tf32, config, scales,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_dense(
    x, values, indptr, indices, bias, residual, input_permutation, output_permutation, schedule,
    out_features, activation, allow_tf32, config, scales,
):  # fmt: skip
    """The same function through a dense weight, differentiable in all but quantised values and their scales."""
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    values = values if scales is None else dequantize(values, scales, indptr, x.dtype)
    weight = dense_weight(values, indptr, indices, (out_features, x.shape[-1]))
    return finish(F.linear(x, weight), bias, activation, residual, output_permutation, dim=-1)


LINEAR = Operation(
    "block_sparse_linear", run_linear, cpu=_linear_cpu, shape=_linear_shape, dense=_linear_dense,
    memory_format=torch.contiguous_format,
)  # fmt: skip
block_sparse_linear = LINEAR.op


# -- channel permutation ----------------------------------------------------------------------------------------------
def run_permutation(x: Tensor, permutation: Tensor, dim: int) -> Tensor:
    """y[..., j, ...] = x[..., permutation[j], ...] along ``dim``: pure data movement, x read and y written once."""
    device_info(x.device)
    from tetris.kernels.permute import permute_channels as launch

    return launch(x, permutation, dim=dim)


def _permute_cpu(x, permutation, dim):
    y = x.index_select(dim, permutation)
    return y.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else y


def _permute_shape(x, permutation, dim):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y.to(memory_format=torch.channels_last) if x.dim() == 4 else y


PERMUTATION = Operation(
    "permute_channels", run_permutation, cpu=_permute_cpu, shape=_permute_shape,
    dense=lambda x, permutation, dim: x.index_select(dim, permutation),
)  # fmt: skip
permute_channels = PERMUTATION.op
