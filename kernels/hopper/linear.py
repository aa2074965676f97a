"""Block-sparse linear layer for Hopper: what it takes, its shared memory, and the launch. See ``linear_device``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tetris.errors import UnsupportedError, describe
from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.device import device_info
from tetris.kernels.hopper.linear_schedule import STAGE_K, STRIP, LinearSchedule, make_linear_schedule
from tetris.kernels.recording import launch

TILE_TOKENS = (128, 256)
"""Tokens of a task: the columns of one wgmma, which are the most it takes, or half of them."""

ITEM_SIZE = 2
SHARED_LIMIT = 232448
BARRIER_BYTES = 512


def ring_stages(tile_tokens: int, residual: bool) -> int:
    """Stages of the ring that fit into shared memory beside the output tiles: one holds both strips' weights too.

    A strip's output leaves by way of two tiles of 64 tokens; a residual needs room for all of them, and a tile more to
    change its layout.
    """
    stage = (tile_tokens + 2 * STRIP) * STAGE_K * ITEM_SIZE
    output_tokens = 2 * tile_tokens + STRIP if residual else 4 * STRIP
    return (SHARED_LIMIT - BARRIER_BYTES - output_tokens * STRIP * ITEM_SIZE) // stage


def supports(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why this problem cannot run here with this config; None = it can."""
    version = tuple(int(part) for part in device.triton_version.split(".")[:2] if part.isdigit())
    block_out, block_in = problem.block
    if device.backend != "cuda" or device.capability != (9, 0):
        return f"needs compute capability 9.0; {device.name} has {device.capability}"
    if version < (3, 6):
        return f"needs Triton 3.6 or newer; found {device.triton_version}"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16; got {problem.dtype}"
    if problem.weight_dtype:
        return f"takes weights of x's dtype; got {problem.weight_dtype}"
    if block_out != STRIP // 2 and block_out % STRIP:
        return f"takes blocks of {STRIP // 2} or multiples of {STRIP} outputs; got {block_out}"
    if block_in < 16 or (block_in > STAGE_K and block_in % STAGE_K) or STAGE_K % min(block_in, STAGE_K):
        return f"takes blocks of 16, 32 or multiples of {STAGE_K} inputs; got {block_in}"
    if problem.in_features % 8 or problem.out_features % 8:
        return f"takes multiples of 8 features (16-byte rows); got {problem.in_features} -> {problem.out_features}"
    if config.tile_tokens not in TILE_TOKENS:
        return f"takes tile_tokens in {TILE_TOKENS}; got {config.tile_tokens}"
    return None


def refuse_permutations(
    x: torch.Tensor, input_permutation: torch.Tensor | None, output_permutation: torch.Tensor | None
) -> None:
    """Raise UnsupportedError where a permutation is given to a kernel that moves whole tiles."""
    if input_permutation is not None or output_permutation is not None:
        raise UnsupportedError(
            f"hopper linear: wanted no permutations, it moves whole tiles; got them for x {describe(x)}; permute "
            "before and after, fold them into the neighbouring layers, or use the portable kernel"
        )


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
    schedule: Sequence[torch.Tensor] | LinearSchedule | None = None,
) -> torch.Tensor:
    """As :func:`tetris.kernels.linear.block_sparse_linear`, for problems that :func:`supports` takes.

    Args:
        input_permutation, output_permutation: must be None, see :func:`supports`.
        schedule: of this layout, number of tokens and config (:func:`make_linear_schedule`); made anew, which costs
            far more than the product itself, when missing.
    Returns:
        [..., out_features] of x's dtype.
    Raises:
        UnsupportedError: permutations were given.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tetris.kernels.descriptors import describable_rows
    from tetris.kernels.hopper.linear_device import block_sparse_linear_kernel

    refuse_permutations(x, input_permutation, output_permutation)
    x2 = describable_rows(x)
    tokens = x2.shape[0]
    block_out, block_in = values.shape[-2:]
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    output = y.view(*x.shape[:-1], out_features)
    if tokens == 0:
        return output
    if schedule is None:
        programs = device_info(x.device).sm_count
        schedule = make_linear_schedule(
            indptr, indices, block=(block_out, block_in), tokens=tokens,
            tile_tokens=config.tile_tokens, n_programs=programs,
        )  # fmt: skip
    entries, tasks, counters = schedule.tensors if isinstance(schedule, LinearSchedule) else schedule
    workspace = torch.empty((len(counters), 2, STRIP, config.tile_tokens), dtype=torch.float32, device=x.device)
    tile_k = min(block_in, STAGE_K)
    parts = max(1, STRIP // block_out)
    rows = STRIP // parts
    gather = entries.shape[1] > 2 + 2 * parts * STAGE_K // tile_k

    def descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
        layout = NVMMASharedLayout(box[1] * ITEM_SIZE, 8 * ITEM_SIZE, rank=2)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)

    y_desc = descriptor(y, [STRIP, rows])
    launch(
        block_sparse_linear_kernel,
        (tasks.shape[1],),
        descriptor(x2, [config.tile_tokens, tile_k if gather else STAGE_K]),
        descriptor(values.view(-1, block_in), [rows, tile_k]),
        y_desc,
        y_desc if residual is None else descriptor(residual.reshape(tokens, out_features).contiguous(), [STRIP, rows]),
        y if bias is None else bias,
        entries,
        tasks,
        counters,
        workspace,
        out_features,
        TILE_M=config.tile_tokens,
        TILE_K=tile_k,
        GROUP=STAGE_K // tile_k,
        PARTS=parts,
        BLOCK_IN=block_in,
        STAGES=config.x_stages or ring_stages(config.tile_tokens, residual is not None),
        GATHER=gather,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        num_warps=4,
    )
    return output
