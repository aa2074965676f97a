"""Block-sparse linear layer on a CPU: one dense matrix product per group of block rows, on the inputs it keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.kernels.cpu.epilogue import finish_
from tetris.kernels.cpu.grouping import PIXELS, CostModel, Grouping, group_layout
from tetris.layout import BlockLayout
from tetris.quantization import dequantize

CALL_US = 12.0


def prepare(
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    in_features: int,
    out_features: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    tokens: int = PIXELS,
) -> Grouping:
    """Repack the blocks [n_blocks, BLOCK_OUT, BLOCK_IN] for :func:`run`, once.

    ``tokens`` is about how many rows x will have; it decides how many block rows share an operation, not the result.
    """
    block = (values.shape[-2], values.shape[-1])
    return group_layout(
        values,
        BlockLayout((out_features, in_features), block, indptr, indices),
        CostModel(block, 1, tokens, CALL_US),
        input_permutation=input_permutation,
        output_permutation=output_permutation,
    )


def run(
    prepared: Grouping,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W^T + bias + residual) for x [..., in_features]; bias in the order of the block rows."""
    rows = x.reshape(-1, x.shape[-1])
    biases = prepared.biases(bias, x.dtype)
    y = prepared.join([F.linear(g.inputs.take(rows), g.weight, b) for g, b in zip(prepared.groups, biases)])
    return finish_(y.view(*x.shape[:-1], y.shape[1]), residual, activation)


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
    """Prepare and run in one call; a layer keeps the prepared operands instead. Arguments as in the GPU launcher."""
    prepared = prepare(
        values if scales is None else dequantize(values, scales, indptr, x.dtype),
        indptr,
        indices,
        in_features=x.shape[-1],
        out_features=out_features,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
    )
    return run(prepared, x, bias, activation=activation, residual=residual)
