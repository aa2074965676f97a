"""Launcher of the Hopper convolution: descriptors, tile counts, one launch; allocates only the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tetris.errors import ShapeError, UnsupportedError, describe
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.device import device_info
from tetris.kernels.hopper.fill import fill_tensor, filling_pays, idle_block_rows, idle_rows
from tetris.kernels.hopper.geometry import WEIGHT_ROW_BYTES, WGMMA_ROWS, ConvTile
from tetris.kernels.hopper.heuristics import complete_tile, supports
from tetris.kernels.hopper.pairing import pair_block_rows
from tetris.kernels.hopper.pieces import FEW_TILES, SMALL_TILE_COST, STEP_CYCLES_64, piece_cost, row_pieces
from tetris.kernels.hopper.schedule import EMPTY_TILE_COST, TILE_COST, Schedule, make_schedule, one_list, round_robin
from tetris.kernels.hopper.tile_choice import memory_decides, step_cycles
from tetris.kernels.hopper.weights import arranged_weights
from tetris.kernels.recording import launch
from tetris.layout import ceil_div

__all__ = ["block_sparse_conv2d", "conv2d_schedule", "descriptors", "supports"]


def _problem(x: torch.Tensor, values: torch.Tensor, c_out: int, **geometry: Any) -> Conv2dProblem:
    batch, c_in, height, width = x.shape
    block = (values.shape[2], values.shape[3])
    dtype = str(x.dtype).removeprefix("torch.")
    return Conv2dProblem(batch, c_in, c_out, height, width, block=block, dtype=dtype, n_blocks=len(values), **geometry)


def conv2d_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    problem: Conv2dProblem,
    config: Conv2dConfig,
    sm_count: int,
    device: torch.device | str,
    values: torch.Tensor | None = None,
    *,
    fills: bool | None = None,
    cuts: bool = True,
    takes: bool | None = None,
) -> Schedule:
    """The schedule of a convolution; depends on its layout, output size and config only, so compute it once.

    Args:
        indptr, indices: the block layout; read on the CPU (device tensors cost a synchronization).
        problem, config: as the launch will have them.
        sm_count: programs to keep busy.
        device: where the schedule's tensors go.
        values: the packed blocks. Where a block takes several steps, the schedule keeps a copy of them in the order of
            the steps: make it again when they change. None leaves that copy to every launch.
        fills: whether strips of channels without blocks, or with nothing but one block of zeros, are stored beside the
            products of the others; None = where that pays.
        cuts: whether rows that keep many blocks are cut into pieces for several programs where tiles are few.
        takes: whether programs take tiles from one list when they need them, where nothing is filled or cut; None =
            where memory decides.
    """
    tile = complete_tile(problem, config)
    pairs = pair_block_rows(indptr, indices) if tile.parts > 1 else None
    blocks = (indptr if pairs is None else pairs.indptr).cpu().diff().tolist()
    unit = tile.k_steps * step_cycles(tile) / STEP_CYCLES_64
    n, h, w = tile.tiles(problem.batch, *problem.output_size)
    spatial = n * h * w
    extent = (tile.tile_h, tile.tile_w, tile.tile_n)
    few = len(blocks) * tile.halves * spatial <= FEW_TILES * sm_count
    empty = 0.0 if few else EMPTY_TILE_COST - TILE_COST
    costs = [count * unit or empty for count in blocks for _ in range(tile.halves)]
    weights = None if values is None or tile.k_steps == 1 else arranged_weights(values, tile.tile_k)
    lists = (indptr, indices) if pairs is None else (pairs.indptr, pairs.indices)
    if config.schedule != "balanced":
        made = round_robin(len(costs), spatial, sm_count).with_work(*lists, tile.halves, None, (h, w), extent)
        return replace(made, pairs=pairs, weights=weights).to(device)
    idle, channels = idle_rows(idle_block_rows(indptr, values), tile.halves, pairs)
    if fills is None:
        fills = not few and filling_pays(problem, len(idle), len(costs))
    if not fills or len(idle) == len(costs):
        idle, channels = [], []
    entries = [0 if row in idle else blocks[row // tile.halves] for row in range(len(costs))]
    parts = row_pieces(costs, entries, spatial, sm_count, tile) if few and cuts else [1] * len(costs)
    pieces = [row for row, n in enumerate(parts) for _ in range(n)]
    piece_costs = [piece_cost(costs[row], parts[row], tile) for row in pieces]
    unused = [i for i, row in enumerate(pieces) if row in idle]
    fixed = SMALL_TILE_COST if few else TILE_COST
    if takes is None:
        takes = not few and memory_decides(problem, tile, sm_count)
    if takes and not unused and len(pieces) == len(costs):
        made = one_list(piece_costs, spatial, sm_count).with_work(*lists, tile.halves, None, (h, w), extent)
        return replace(made, pairs=pairs, weights=weights).to(device)
    made = make_schedule(piece_costs, spatial, sm_count, idle=unused, tile_cost=fixed)
    fill = fill_tensor(channels, problem.batch * math.prod(problem.output_size), sum(entries) * tile.k_steps * spatial)
    made = replace(made.with_work(*lists, tile.halves, parts, (h, w), extent), fill=fill)
    return replace(made, pairs=pairs, weights=weights).to(device)


def block_sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    c_out: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str = "none",
    residual: torch.Tensor | None = None,
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    max_pool: bool = False,
    config: Conv2dConfig,
    schedule: Schedule | None = None,
) -> torch.Tensor:
    """``pool(activation(conv2d(x, unpacked values) + bias + residual))`` on a Hopper GPU.

    Args:
        x: [N, C_IN, H, W] in channels_last memory; float16, bfloat16 or float32.
        values: packed kept blocks [n_blocks, KH * KW, BLOCK_OUT, BLOCK_IN], x's dtype.
        indptr, indices: int32, the block layout; every block row keeps at least one block.
        bias: [C_OUT] or None.
        c_out: output channels.
        kernel_size, stride, padding, dilation: as in ``torch.nn.functional.conv2d``, (height, width).
        activation: "none", "relu", "relu6", "silu" or "gelu".
        residual: like the output before pooling; channels_last.
        input_permutation: not supported here: fold it into the neighbouring layer.
        output_permutation: int64 [C_OUT]; computed channel j is stored as channel output_permutation[j]. Only where
            ``config.output_group`` says that it moves whole groups of channels: of a group just the first is looked at.
        allow_tf32: float32 runs through tf32 only.
        max_pool: 2 x 2 max-pooling with stride 2 of the result.
        config: tile and ring sizes; zeros are filled in.
        schedule: from :func:`conv2d_schedule`; None computes it here, which synchronizes and is slow.
    Returns:
        [N, C_OUT, H', W'] in channels_last memory, x's dtype.
    Raises:
        UnsupportedError: what :func:`supports` refuses.
        ShapeError: the schedule is of another problem.
    Cost: 2 N H' W' KH KW BLOCK_OUT BLOCK_IN n_blocks FLOP; x is read about once per block row that keeps its channels.
    """
    from tetris.kernels.hopper.conv2d_device import conv2d_kernel

    problem = _problem(x, values, c_out, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    reason = supports(problem, device_info(x.device), config, max_pool=max_pool, allow_tf32=allow_tf32)
    if input_permutation is not None or (output_permutation is not None and not config.output_group):
        reason = "it permutes output channels in groups only, and where the config says so: fold the permutation"
    if output_permutation is not None and residual is not None:
        reason = "it adds no residual to permuted channels"
    if not x.is_contiguous(memory_format=torch.channels_last):
        reason = f"x must be in channels_last memory; got strides {x.stride()}"
    if reason:
        raise UnsupportedError(f"hopper convolution: {reason}; x is a {describe(x)}; use the portable kernel")
    tile = complete_tile(problem, config, max_pool=max_pool)
    height, width = problem.output_size
    n, h, w = tile.tiles(problem.batch, height, width)
    rows = ceil_div(problem.block_rows, tile.parts) * tile.halves
    if schedule is None:
        sm_count = device_info(x.device).sm_count
        schedule = conv2d_schedule(indptr, indices, problem, config, sm_count, x.device)
    tiles, cut_tiles = rows * n * h * w, 0 if schedule.takes else len(schedule.counters)
    if len(schedule.order) < tiles + cut_tiles or (len(schedule.order) > tiles and not cut_tiles):
        raise ShapeError(
            f"hopper convolution: wanted a schedule of {rows * n * h * w} tiles ({rows} rows x {n} x {h} x {w}); "
            f"got one of {len(schedule.order)}; make it with conv2d_schedule for this input and config"
        )
    scale = 2 if max_pool else 1
    y = torch.empty(problem.batch, height // scale, width // scale, c_out, dtype=x.dtype, device=x.device)
    y = y.permute(0, 3, 1, 2)
    arguments, constants = launch_arguments(
        x, values, indices, bias, residual, y, tile, schedule,
        activation=activation, max_pool=max_pool, permutation=output_permutation, sectors=config.fetch == "sectors",
    )  # fmt: skip
    run = partial(launch, conv2d_kernel, (schedule.programs,), *arguments, **constants)
    if config.fetch == "sectors":  # its programs write descriptors to memory that the launcher asks us for
        copy_context().run(_with_scratch, run, x.device)
    else:
        run()
    return y


def _with_scratch(run: Callable[[], object], device: torch.device) -> None:
    """Launch with an allocator of scratch memory; to be run in a context of its own, where the setting ends."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    run()


def launch_arguments(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    tile: ConvTile,
    schedule: Schedule,
    *,
    activation: str,
    max_pool: bool,
    permutation: torch.Tensor | None = None,
    sectors: bool = False,
    turns: bool = True,
    producer_warps: int = 1,
    overlap: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """(positional, keyword) arguments of ``conv2d_kernel``; nothing is read, so CPU tensors do for compiling.

    ``sectors``: see ``Conv2dConfig.fetch``. ``turns`` (whether :attr:`ConvTile.turns` counts), ``producer_warps`` and
    ``overlap`` (programs start while the kernel before ends, and wait for it) are there for ablations.
    """
    scale = 2 if max_pool else 1
    rows = ceil_div(ceil_div(y.shape[1], tile.block_out), tile.parts) * tile.halves
    weights = arranged_weights(values, tile.tile_k) if schedule.weights is None else schedule.weights
    pairs = schedule.pairs
    lists = [indices, None, None] if pairs is None else [pairs.indices, pairs.blocks, pairs.rows]
    permutes = permutation is not None
    fills, cut_tiles = residual is None and len(schedule.fill) > 0, 0 if schedule.takes else len(schedule.counters)
    workspace = None
    if cut_tiles:
        places = len(schedule.order) - rows * math.prod(tile.tiles(y.shape[0], y.shape[2] * scale, y.shape[3] * scale))
        size = 2 * tile.consumer_rows[0] * tile.row_pixels * WGMMA_ROWS
        workspace = torch.empty(places + cut_tiles, size, dtype=torch.float32, device=y.device)
    loads = [x.permute(0, 2, 3, 1) if sectors else None]
    stores = [y.permute(0, 2, 3, 1) if permutes or fills else None, permutation]
    walk = [schedule.program_ptr, schedule.ends if fills else schedule.program_ptr[1:], schedule.work]
    pieces = [schedule.counters if cut_tiles or schedule.takes else None, workspace]
    tensors = [*loads, *stores, bias, *lists, *walk, schedule.fill if fills else None, *pieces]
    flags = {"ACTIVATION": activation, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    options = {
        "PERMUTES": permutes,
        "POOL": max_pool,
        "TURNS": turns and tile.turns,
        "PRODUCER_WARPS": producer_warps,
        "SECTORS": sectors,
        "FILLS": fills,
        "CUTS": cut_tiles > 0,
        "TAKES": schedule.takes,
        "T": tile,
        "num_warps": 4,
        "launch_pdl": overlap,
    }
    sizes = [y.shape[1], max(0, len(schedule.fill) - 1)]
    return [*descriptors(x, weights, y, residual, tile, max_pool), *tensors, *sizes], flags | options


def descriptors(
    x: torch.Tensor, weights: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None, tile: ConvTile, pool: bool
) -> list[Any]:
    """Tensor descriptors (input, halo, odd columns, their halo, weights, output, residual) in the kernel's order.

    Activations appear as [H, W, N, C], so that boxes come out in the order of the shared-memory tile; weights, see
    :func:`arranged_weights`, as rows of 128 bytes. What a launch does not need is None.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    bits = 8 * tile.item_size
    k_bytes = tile.tile_k * tile.item_size

    def image(tensor: torch.Tensor, box: list[int], swizzle: int, parity: int = 0, step: int = 1) -> TensorDescriptor:
        n, c, h, w = tensor.shape
        shape, strides = [h, ceil_div(w - parity, step), n, c], [w * c, step * c, h * w * c, 1]
        return TensorDescriptor(tensor[..., parity:], shape, strides, box, NVMMASharedLayout(swizzle, bits, rank=4))

    def input_columns(parity: int, width: int) -> TensorDescriptor | None:
        if width == 0 or parity not in tile.planes:
            return None
        return image(x, [1, width, tile.tile_n, tile.tile_k], k_bytes, parity, tile.stride[1])

    weights = weights.view(-1, tile.weight_row_elements)
    w_box = [tile.weight_rows, tile.weight_row_elements]
    w_layout = NVMMASharedLayout(WEIGHT_ROW_BYTES, bits, rank=2)
    w_desc = TensorDescriptor(weights, list(weights.shape), [tile.weight_row_elements, 1], w_box, w_layout)
    rows, columns, width = tile.rows_per_accumulator, tile.tile_w, WGMMA_ROWS // tile.parts
    pooled = [max(1, rows // 2), columns // 2] if pool else [rows, columns]
    y_desc = image(y, [*pooled, tile.tile_n, width], tile.y_swizzle_bytes)
    r_desc = None
    if residual is not None:
        r_desc = image(residual, [rows, columns, tile.tile_n, width], tile.y_swizzle_bytes)
    x_descs = [input_columns(parity, width) for parity in (0, 1) for width in (tile.tile_w, tile.halo_box)]
    return [*x_descs, w_desc, y_desc, r_desc]
