"""Block-sparse linear layer for Hopper, narrow blocks: what it takes, and the launch. See ``narrow_linear_device``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.device import device_info
from tetris.kernels.hopper.linear import ITEM_SIZE, refuse_permutations
from tetris.kernels.hopper.linear import supports as linear_supports
from tetris.kernels.hopper.linear_schedule import STRIP
from tetris.kernels.hopper.narrow_linear_schedule import (
    LINE,
    STAGE_K,
    TILE_OUT,
    TILE_TOKENS,
    make_narrow_schedule,
    ring_stages,
    strip_outputs,
    token_halves,
)
from tetris.kernels.recording import launch

LEAST_WEIGHTS = 1024
"""Of a block: a stage has place for 16 weight tiles."""


def supports(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why this problem cannot run here with this config; None = it can."""
    block_out, block_in = problem.block
    if reason := linear_supports(problem, device, LinearConfig(kernel="hopper", tile_tokens=128)):
        return reason
    if block_in > STAGE_K or block_out * block_in < LEAST_WEIGHTS:
        return f"takes blocks of 16, 32 or 64 inputs and {LEAST_WEIGHTS} weights or more; got {block_out} x {block_in}"
    if block_in == STAGE_K and block_out > STRIP // 2:
        return f"takes blocks of fewer than {STRIP} outputs or inputs; got {block_out} x {block_in}"
    if config.tile_tokens != TILE_TOKENS:
        return f"takes tile_tokens {TILE_TOKENS}; got {config.tile_tokens}"
    if config.tile_out not in (0, *TILE_OUT):
        return f"takes tile_out in {TILE_OUT}; got {config.tile_out}"
    return None


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
    config: LinearConfig,
    schedule: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """As :func:`tetris.kernels.linear.block_sparse_linear`, for problems that :func:`supports` takes.

    Args:
        input_permutation, output_permutation: must be None, see :func:`supports`.
        schedule: the tensors of :func:`make_narrow_schedule` for this layout, number of tokens and config; made anew,
            which costs far more than the product itself, when missing.
    Returns:
        [..., out_features] of x's dtype.
    Raises:
        UnsupportedError: permutations were given.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tetris.kernels.descriptors import describable_rows
    from tetris.kernels.hopper.narrow_linear_device import narrow_block_sparse_linear_kernel

    refuse_permutations(x, input_permutation, output_permutation)
    x2 = describable_rows(x)
    tokens = x2.shape[0]
    block = (values.shape[-2], values.shape[-1])
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    output = y.view(*x.shape[:-1], out_features)
    if tokens == 0:
        return output
    if schedule is None:
        programs = device_info(x.device).sm_count
        schedule = make_narrow_schedule(
            indptr, indices, block=block, tokens=tokens, tile_out=config.tile_out or TILE_OUT[0], n_programs=programs
        ).tensors
    groups, entries, program_ptr, order = schedule
    places = entries.shape[1] - 3
    tile_out = config.tile_out or TILE_OUT[0]
    n = strip_outputs(block, tile_out)

    def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
        layout = NVMMASharedLayout(LINE * ITEM_SIZE, 8 * ITEM_SIZE, rank=2)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, LINE], layout)

    y_desc = descriptor(y, 64)
    launch(
        narrow_block_sparse_linear_kernel,
        (len(program_ptr) - 1,),
        descriptor(x2, TILE_TOKENS),
        descriptor(values.view(-1, LINE), n * block[1] // LINE),
        y_desc,
        y_desc if residual is None else descriptor(residual.reshape(tokens, out_features).contiguous(), 64),
        y if bias is None else bias,
        groups,
        entries,
        program_ptr,
        order,
        len(groups),
        out_features,
        HALVES=token_halves(block),
        TILE_O=tile_out,
        N=n,
        TILE_K=block[1],
        PLACES=places,
        STAGES=ring_stages(places, n * block[1] * ITEM_SIZE),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        num_warps=4,
    )
    return output
