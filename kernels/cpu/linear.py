"""Block-sparse linear layer on a CPU: one dense matrix product per group of block rows, on the inputs it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tetris.kernels.cpu.epilogue import finish_
from tetris.kernels.cpu.grouping import RowGroup, as_slice, dense_groups, merge_similar
from tetris.layout import BlockLayout

OVERHEAD = 0.3


@dataclass(frozen=True)
class PreparedLinear:
    """A layer's weight, repacked once for :func:`run`.

    Attributes:
        groups: the dense products.
        destinations: per group, where its outputs are stored: a slice or int64 indices.
        out_features: features of the output.
    """

    groups: list[RowGroup]
    destinations: list[slice | torch.Tensor]
    out_features: int


def prepare(
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    in_features: int,
    out_features: int,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> PreparedLinear:
    """Repack the blocks [n_blocks, BLOCK_OUT, BLOCK_IN]; permutations are folded in. Cost: one pass over the weight."""
    block = (values.shape[-2], values.shape[-1])
    layout = BlockLayout((out_features, in_features), block, indptr, indices)
    groups = dense_groups(values, layout, merge_similar(layout.to_mask(), OVERHEAD), (), input_permutation)
    stored = [g.outputs if output_permutation is None else output_permutation.cpu()[g.outputs] for g in groups]
    return PreparedLinear(groups, [as_slice(s) or s for s in stored], out_features)


def run(
    prepared: PreparedLinear,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W^T + bias + residual) for x [..., in_features]; bias in the order of the block rows."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(rows.shape[0], prepared.out_features)
    for group, destination in zip(prepared.groups, prepared.destinations):
        narrowed = group.input_slice
        inputs = rows[:, narrowed] if narrowed is not None else rows.index_select(1, group.inputs)
        y[:, destination] = F.linear(inputs, group.weight, None if bias is None else bias[group.outputs].to(x.dtype))
    y = y.view(*x.shape[:-1], prepared.out_features)
    return finish_(y, residual, activation)


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
) -> torch.Tensor:
    """Prepare and run in one call; a layer keeps the prepared operands instead. Arguments as in the GPU launcher."""
    prepared = prepare(
        values,
        indptr,
        indices,
        in_features=x.shape[-1],
        out_features=out_features,
        input_permutation=input_permutation,
        output_permutation=output_permutation,
    )
    return run(prepared, x, bias, activation=activation, residual=residual)
