"""Device code of the Hopper convolution (Gluon, sm_90): one producer warpgroup feeds two consumer warpgroups.

The producer issues TMA loads: for every kept block the input tile with its halo (all taps read it) and the weights in
groups of taps. A consumer accumulates 64 output channels x its rows of the tile: weights are wgmma's register operand,
pixels its shared-memory operand, ``acc[out, pixel] += w[out, k] x[pixel, k]``. Programs are persistent and walk the
schedule's list of tiles. Geometry: ``geometry.ConvTile``, a compile-time constant here called T.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 -- the compiler's Python has no starred tuples
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tetris.kernels.hopper.fill_device import filler
from tetris.kernels.hopper.finish_device import finish_tile
from tetris.kernels.hopper.load_device import RECORD, entries_at, origin_at, producer, row_at
from tetris.kernels.hopper.pieces_device import added_sums, leave_sums
from tetris.kernels.hopper.take_device import RING, hear


@gluon.jit
def load_weights(w_buffer, index, LEFT: gl.constexpr, T: gl.constexpr):
    """[64, TILE_K] weights of one tap, to registers."""
    LAYOUT: gl.constexpr = gl.SharedLinearLayout(T.weight_bases, alignment=1024)
    return w_buffer.index(index * T.parts)._reinterpret(w_buffer.dtype, [64, T.tile_k], LAYOUT).load(LEFT)


@gluon.jit
def await_bands(x_full, stage, phase, dy: gl.constexpr, WARPGROUP: gl.constexpr, T: gl.constexpr):
    """Wait for the input rows that kernel row ``dy`` is the first of this warpgroup to read."""
    BANDS: gl.constexpr = len(T.bands)
    for band in gl.static_range(BANDS):
        if T.bands[band].first[WARPGROUP] == dy:
            mbarrier.wait(x_full.index(stage * BANDS + band), phase)


@gluon.jit
def release_bands(x_empty, stage, dy: gl.constexpr, WARPGROUP: gl.constexpr, T: gl.constexpr):
    """Give back the input rows that kernel row ``dy`` was the last of this warpgroup to read."""
    BANDS: gl.constexpr = len(T.bands)
    for band in gl.static_range(BANDS):
        if T.bands[band].last[WARPGROUP] == dy:
            mbarrier.arrive(x_empty.index(stage * BANDS + band))


@gluon.jit
def multiply_step(
    accs, x_buffer, w_buffer, x_full, x_empty, w_full, w_empty, turn, xi, wi,
    WARPGROUP: gl.constexpr, R: gl.constexpr, TURNS: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """All taps of one step: ``accs`` += weights x shifted tile; returns (accs, weight groups consumed so far).

    With TURNS the two warpgroups multiply in turns, half a step apart: one's epilogue then runs beside the other's
    products, and the tensor cores do not wait for either.
    """
    DTYPE: gl.constexpr = x_buffer.dtype
    N: gl.constexpr = T.accumulator_pixels
    TAPS: gl.constexpr = T.taps
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32 // T.item_size]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 // T.item_size)
    RIGHT: gl.constexpr = gl.NVMMASharedLayout(T.tile_k * T.item_size, T.item_size * 8, rank=2)
    ROW0: gl.constexpr = 0 if WARPGROUP == 0 else T.consumer_rows[0]
    w_stage = wi % T.w_stages
    mbarrier.wait(w_full.index(w_stage), (wi // T.w_stages) & 1)
    w = load_weights(w_buffer, w_stage * T.w_taps, LEFT, T)
    w_before = w
    x_stage = xi % T.x_stages
    base = x_stage * T.stage_groups + ROW0 * T.row_stride * T.row_groups
    if TURNS:
        mbarrier.wait(turn.index(WARPGROUP), (xi & 1) ^ (1 - WARPGROUP))
    for tap in gl.static_range(TAPS):
        if tap % T.kernel_width == 0:
            await_bands(x_full, x_stage, (xi // T.x_stages) & 1, tap // T.kernel_width, WARPGROUP, T)
        started = ()
        for r in gl.static_range(R):
            row = r * T.rows_per_accumulator * T.row_stride + tap // T.kernel_width * T.dilation_h
            pixels = x_buffer.index(base + row * T.row_groups + T.column_groups[tap % T.kernel_width])
            pixels = pixels._reinterpret(DTYPE, [N, T.tile_k], RIGHT).permute((1, 0))
            started = started + (warpgroup_mma(w, pixels, accs[r], is_async=True),)
        if TURNS and tap + 1 == TAPS:
            mbarrier.arrive(turn.index(1 - WARPGROUP))
        if tap > 0:  # the tap before has ended: its weights' registers are free again
            waited = warpgroup_mma_wait(R, deps=started + (w_before,))
            started = waited[:R]
            if tap % T.kernel_width == 0:
                release_bands(x_empty, x_stage, tap // T.kernel_width - 1, WARPGROUP, T)
        w_before = w
        if tap + 1 < TAPS:
            if (tap + 1) % T.w_taps == 0:
                mbarrier.arrive(w_empty.index(w_stage))
                wi += 1
                w_stage = wi % T.w_stages
                mbarrier.wait(w_full.index(w_stage), (wi // T.w_stages) & 1)
            w = load_weights(w_buffer, w_stage * T.w_taps + (tap + 1) % T.w_taps, LEFT, T)
        else:
            mbarrier.arrive(w_empty.index(w_stage))
            wi += 1
        if tap + 1 == TAPS:
            waited = warpgroup_mma_wait(0, deps=started + (w_before,))
            started = waited[:R]
            release_bands(x_empty, x_stage, tap // T.kernel_width, WARPGROUP, T)
        accs = started
    return accs, wi


@gluon.jit
def consumer(
    y_desc, r_desc, y_ptr, permutation, bias, row_of_part, program_ptr, end_ptr, work, c_out,
    x_buffer, w_buffer, y_buffer, x_full, x_empty, w_full, w_empty, r_full, turn, notices, told, heard, counters,
    workspace, WARPGROUP: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    PERMUTES: gl.constexpr, POOL: gl.constexpr, TURNS: gl.constexpr, CUTS: gl.constexpr, TAKES: gl.constexpr,
    T: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: accumulates its rows of every tile and finishes them, or with CUTS leaves its piece."""
    N: gl.constexpr = T.accumulator_pixels
    R: gl.constexpr = T.consumer_rows[WARPGROUP] // T.rows_per_accumulator
    MOST_R: gl.constexpr = T.consumer_rows[0] // T.rows_per_accumulator
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32 // T.item_size]
    )
    PARTS: gl.constexpr = T.parts
    WIDTH: gl.constexpr = 64 // T.parts
    xi = 0
    wi = 0
    yi = 0
    ri = 0
    number = 0
    program = gl.program_id(0)
    position = program if TAKES else gl.load(program_ptr + program)
    last = gl.load(end_ptr + program) - 1
    while position <= last:
        begin, end, _column = entries_at(work, position)  # the producer has just read them: they are in L1
        row = row_at(work, position)
        shift = 0.0
        if HAS_BIAS:
            lanes = gl.arange(0, 64, gl.SliceLayout(1, ACC))
            channels = row * 64 + lanes
            if PARTS > 1:
                channels = gl.load(row_of_part + row * PARTS + lanes // WIDTH) * WIDTH + lanes % WIDTH
            shift = gl.load(bias + channels, mask=channels < c_out, other=0.0).to(gl.float32)
        accs = ()
        for _r in gl.static_range(R):
            accs = accs + (gl.zeros((64, N), gl.float32, ACC),)
        for _step in range(begin * T.k_steps, end * T.k_steps):
            accs, wi = multiply_step(
                accs, x_buffer, w_buffer, x_full, x_empty, w_full, w_empty, turn, xi, wi, WARPGROUP, R, TURNS, T
            )
            xi += 1
        y0, x0, n0 = origin_at(work, position)
        if CUTS:
            pieces = gl.load(work + position * RECORD + 4)
            is_last = True
            if pieces > 1:
                place = work + position * RECORD
                is_last = leave_sums(accs, workspace, counters, place, pieces, WARPGROUP, R, MOST_R, N)
                if is_last:
                    accs = added_sums(workspace, place, pieces, WARPGROUP, R, MOST_R, N, ACC)
            if is_last:
                yi, ri = finish_tile(
                    accs, shift, row, y0, x0, n0, yi, ri, y_desc, r_desc, y_ptr, permutation, row_of_part, c_out,
                    y_buffer, r_full, WARPGROUP, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, PERMUTES, POOL, R, T,
                )  # fmt: skip
        else:
            yi, ri = finish_tile(
                accs, shift, row, y0, x0, n0, yi, ri, y_desc, r_desc, y_ptr, permutation, row_of_part, c_out, y_buffer,
                r_full, WARPGROUP, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, PERMUTES, POOL, R, T,
            )  # fmt: skip
        if TAKES:
            mbarrier.arrive(heard.index(number % RING))
            number += 1
            position = hear(notices, told, number)
        else:
            position += 1
    tma.store_wait(0)


@gluon.jit
def without_promotion(desc, first):
    """The same descriptor made by the program: L2 then fetches the sectors that a box touches, not whole lines."""
    return tma.make_tensor_descriptor(
        first,
        [desc.shape[0], desc.shape[1], desc.shape[2], desc.shape[3]],
        [desc.strides[0], desc.strides[1], desc.strides[2], 1],
        desc.block_shape,
        desc.layout,
    )


@gluon.jit(do_not_specialize=["c_out", "strips"])
def conv2d_kernel(
    x_desc, halo_desc, odd_desc, odd_halo_desc, w_desc, y_desc, r_desc, x_ptr, y_ptr, permutation, bias,
    indices, blocks, row_of_part, program_ptr, end_ptr, work, fill, counters, workspace, c_out, strips,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, PERMUTES: gl.constexpr,
    POOL: gl.constexpr, TURNS: gl.constexpr, PRODUCER_WARPS: gl.constexpr, SECTORS: gl.constexpr,
    FILLS: gl.constexpr, CUTS: gl.constexpr, TAKES: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Allocate the rings and start the three roles. Grid: one program per entry of ``program_ptr``; num_warps=4.

    ``x_desc``, ``halo_desc``: input as [H, W, N, C], boxes [1, TILE_W or halo, TILE_N, TILE_K]; with a width stride of
    2 its even columns, and ``odd_*`` its odd ones. ``w_desc``: see ``weights.arranged_weights``, rows of 128 bytes, one
    box for the 64 or BLOCK_OUT rows of a tap. ``y_desc``, ``r_desc``: output and residual as [H, W, N, C_OUT], boxes
    [rows, TILE_W, TILE_N, 64 or BLOCK_OUT]. ``y_ptr``, ``permutation``: for :func:`store_groups`, where it PERMUTES.
    ``blocks``, ``row_of_part``: see ``pairing.PairedRows``. ``program_ptr``, ``end_ptr``, ``work``, ``fill`` (if it
    FILLS, of ``strips`` strips), ``counters`` (if it CUTS; ``workspace`` takes the sums of all pieces): see
    ``schedule.Schedule``; where programs take tiles (TAKES), ``counters`` counts those. What a launch does not need is
    None.
    """
    gdc_wait()  # with OVERLAP in the launcher: the kernel before may still be running until here
    gdc_launch_dependents()
    DTYPE: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = T.item_size * 8
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(T.tile_k * T.item_size, BITS, rank=2)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(T.y_swizzle_bytes, BITS, rank=2)
    X_STAGES: gl.constexpr = T.x_stages
    BANDS: gl.constexpr = len(T.bands)
    W_STAGES: gl.constexpr = T.w_stages
    x_buffer = gl.allocate_shared_memory(DTYPE, [T.x_stages * T.stage_groups, 8, T.tile_k], K_LAYOUT)
    w_buffer = gl.allocate_shared_memory(
        DTYPE, [T.w_stages * T.w_taps * T.parts, T.weight_rows, T.weight_row_elements], w_desc.layout
    )
    y_buffer = gl.allocate_shared_memory(DTYPE, [2 * T.y_stages, T.accumulator_pixels, 64], Y_LAYOUT)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES * BANDS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES * BANDS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    r_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    notices = gl.allocate_shared_memory(gl.int32, [RING, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    for band in gl.static_range(BANDS):
        for i in gl.static_range(X_STAGES):
            mbarrier.init(x_full.index(i * BANDS + band), count=1)
            mbarrier.init(x_empty.index(i * BANDS + band), count=T.bands[band].readers + (FILLS and band == 0))
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(r_full.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    if SECTORS:
        x_desc = without_promotion(x_desc, x_ptr)
        if halo_desc is not None:
            halo_desc = without_promotion(halo_desc, x_ptr)
    gl.warp_specialize(
        [
            (consumer, (y_desc, r_desc, y_ptr, permutation, bias, row_of_part, program_ptr, end_ptr, work, c_out,
                        x_buffer, w_buffer, y_buffer, x_full, x_empty, w_full, w_empty, r_full, turn, notices, told,
                        heard, counters, workspace, 0, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, PERMUTES, POOL, TURNS, CUTS,
                        TAKES, T)),
            (consumer, (y_desc, r_desc, y_ptr, permutation, bias, row_of_part, program_ptr, end_ptr, work, c_out,
                        x_buffer, w_buffer, y_buffer, x_full, x_empty, w_full, w_empty, r_full, turn, notices, told,
                        heard, counters, workspace, 1, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, PERMUTES, POOL, TURNS, CUTS,
                        TAKES, T)),
            (producer, ((x_desc, halo_desc, odd_desc, odd_halo_desc), w_desc,
                        indices, blocks, program_ptr, end_ptr, work, x_buffer, w_buffer, x_full, x_empty,
                        w_full, w_empty, counters, notices, told, heard, PRODUCER_WARPS, TAKES, T)),
            (filler, (fill, strips, program_ptr, end_ptr, work, x_full, x_empty, bias, permutation, y_ptr, y_desc,
                      c_out, ACTIVATION, HAS_BIAS, PERMUTES, FILLS, T)),
        ],
        [4, PRODUCER_WARPS, 1],
        [224, 56, 64],  # registers; with 40 for the producer, 5 x 5 kernels spilled there
    )  # fmt: skip
