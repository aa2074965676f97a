"""The end of a tile of the Hopper convolution: bias, residual, activation, pooling, and its way to memory (Gluon)."""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tetris.kernels.hopper.epilogue_device import activate, pool_columns, pool_rows
from tetris.kernels.hopper.store_device import store_groups


@gluon.jit
def first_channel(row, part, row_of_part, T: gl.constexpr):
    """Where the output channels of one part of a row of 64 begin."""
    channel = row * 64
    if T.parts > 1:
        channel = gl.load(row_of_part + row * T.parts + part) * T.block_out
    return channel


@gluon.jit
def finish_tile(
    accs, shift, row, y0, x0, n0, yi, ri, y_desc, r_desc, y_ptr, permutation, row_of_part, c_out, y_buffer, r_full,
    WARPGROUP: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    PERMUTES: gl.constexpr, POOL: gl.constexpr, R: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Finish and store a warpgroup's R accumulators; returns (yi, ri), the output stages and residuals used so far.

    ``shift``: its bias [64] in fp32, where it has one. The other arguments are the kernel's.
    """
    DTYPE: gl.constexpr = y_desc.dtype
    N: gl.constexpr = T.accumulator_pixels
    ROWS: gl.constexpr = T.rows_per_accumulator
    ROW0: gl.constexpr = 0 if WARPGROUP == 0 else T.consumer_rows[0]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32 // T.item_size]
    )
    SHRINK: gl.constexpr = 2 if POOL else 1
    PAIRS: gl.constexpr = SHRINK if ROWS == 1 else 1  # accumulators whose maximum is stored: one may hold both rows
    OUT_PIXELS: gl.constexpr = N * PAIRS // (SHRINK * SHRINK)
    PARTS: gl.constexpr = T.parts
    WIDTH: gl.constexpr = 64 // T.parts
    BOX: gl.constexpr = [ROWS, T.tile_w, T.tile_n, WIDTH]
    OUT_BOX: gl.constexpr = [ROWS * PAIRS // SHRINK, T.tile_w // SHRINK, T.tile_n, WIDTH]
    OUT_R: gl.constexpr = R // PAIRS
    for r in gl.static_range(OUT_R):
        tma.store_wait((T.y_stages - 1) * PARTS)
        out = y_buffer.index(WARPGROUP * T.y_stages + yi % T.y_stages)
        yi += 1
        y = y0 + ROW0 + r * ROWS * PAIRS
        for i in gl.static_range(PAIRS):
            value = accs[r * PAIRS + i]
            if HAS_BIAS:
                value = value + gl.expand_dims(shift, 1)
            if HAS_RESIDUAL:
                mbarrier.expect(r_full.index(WARPGROUP), 64 * N * T.item_size)
                for part in gl.static_range(PARTS):
                    target = out._reinterpret(DTYPE, [PARTS, N, WIDTH], out.layout).index(part)
                    target = target._reinterpret(DTYPE, BOX, r_desc.layout)
                    place = [y + i * ROWS, x0, n0, first_channel(row, part, row_of_part, T)]
                    tma.async_copy_global_to_shared(r_desc, place, r_full.index(WARPGROUP), target)
                mbarrier.wait(r_full.index(WARPGROUP), ri & 1)
                ri += 1
                value = value + out.permute((1, 0)).load(ACC).to(gl.float32)
            value = activate(value, ACTIVATION)
            if i == 0:
                kept = value
            else:
                kept = gl.maximum(kept, value)
        if POOL:
            if ROWS > 1:
                kept = pool_rows(kept, ROWS, T.row_pixels)
            kept = pool_columns(kept, OUT_BOX[0] * T.tile_w, T.tile_n)
            out = out._reinterpret(DTYPE, [OUT_PIXELS, 64], out.layout)
        out.permute((1, 0)).store(kept.to(DTYPE))
        fence_async_shared()
        for part in gl.static_range(PARTS):
            source = out._reinterpret(DTYPE, [PARTS, OUT_PIXELS, WIDTH], out.layout).index(part)
            channel = first_channel(row, part, row_of_part, T)
            if PERMUTES:
                store_groups(source, y_ptr, y_desc, permutation, y // SHRINK, x0 // SHRINK, n0, channel, c_out, OUT_BOX)
            else:
                place = [y // SHRINK, x0 // SHRINK, n0, channel]
                tma.async_copy_shared_to_global(y_desc, place, source._reinterpret(DTYPE, OUT_BOX, y_desc.layout))
    return yi, ri
