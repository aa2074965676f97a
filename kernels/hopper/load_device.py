"""The loading half of the Hopper convolution (Gluon): which tiles there are, and the producer's loads for each.

For every kept block the producer loads the input tile with its halo (all taps read it) and the weights in groups of
taps. See ``conv2d_device`` for the roles and ``geometry.ConvTile``, here T, for the tile.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tetris.kernels.hopper.geometry import WORK_FIELDS
from tetris.kernels.hopper.take_device import answer, ask, tell

RECORD: gl.constexpr = gl.constexpr(WORK_FIELDS)


@gluon.jit
def entries_at(work, position):
    """(first entry, one past its last, input block of the first) of a position in the schedule's list."""
    record = work + position * RECORD
    return gl.load(record + 1), gl.load(record + 2), gl.load(record + 3)


@gluon.jit
def origin_at(work, position):
    """(y, x, image) where the tile of a position in the schedule's list begins."""
    record = work + position * RECORD
    return gl.load(record + 9), gl.load(record + 10), gl.load(record + 11)


@gluon.jit
def row_at(work, position):
    """The row of 64 output channels of a position in the schedule's list."""
    return gl.load(work + position * RECORD + 8)


@gluon.jit
def load_input_tile(x_descs, x_buffer, x_full, x_empty, xi, y0, x0, n0, channel, T: gl.constexpr):
    """Issue the loads of one input stage: TILE_K channels of the tile and its halo; TMA zero-fills the padding.

    ``x_descs``: for even and odd columns (the same where the width's stride is 1), boxes of the tile and of its halo.
    """
    BANDS: gl.constexpr = len(T.bands)
    stage = xi % T.x_stages
    for band in gl.static_range(BANDS):
        barrier = x_full.index(stage * BANDS + band)
        mbarrier.wait(x_empty.index(stage * BANDS + band), ((xi // T.x_stages) & 1) ^ 1)
        mbarrier.expect(barrier, T.bands[band].rows * T.row_bytes)
        for i in gl.static_range(gl.constexpr(T.bands[band].rows)):
            load_input_row(x_descs, x_buffer, barrier, stage, T.bands[band].row + i, y0, x0, n0, channel, T)


@gluon.jit
def load_input_row(x_descs, x_buffer, barrier, stage, row: gl.constexpr, y0, x0, n0, channel, T: gl.constexpr):
    """Issue the loads of one stored row."""
    DTYPE: gl.constexpr = x_buffer.dtype
    LAYOUT: gl.constexpr = x_descs[0].layout
    LOADS: gl.constexpr = len(T.column_loads)
    BOX: gl.constexpr = [1, T.tile_w, T.tile_n, T.tile_k]
    HALO_BOX: gl.constexpr = [1, T.halo_box, T.tile_n, T.tile_k]
    first = stage * T.stage_groups + row * T.row_groups
    y = y0 * T.stride_h - T.padding_h + row * T.row_step
    for i in gl.static_range(LOADS):
        place = [y, x0 + T.column_loads[i].column, n0, channel]
        target = x_buffer.index(first + T.column_loads[i].group)
        if T.column_loads[i].halo:
            target = target._reinterpret(DTYPE, HALO_BOX, LAYOUT)
            tma.async_copy_global_to_shared(x_descs[2 * T.column_loads[i].parity + 1], place, barrier, target)
        else:
            target = target._reinterpret(DTYPE, BOX, LAYOUT)
            tma.async_copy_global_to_shared(x_descs[2 * T.column_loads[i].parity], place, barrier, target)


@gluon.jit
def producer(
    x_descs, w_desc, indices, blocks, program_ptr, end_ptr, work,
    x_buffer, w_buffer, x_full, x_empty, w_full, w_empty, counter, notices, told, heard,
    WARPS: gl.constexpr, TAKES: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """The loading warps: input tiles and weights of every tile of this program, as far ahead as the rings allow.

    What the next tile and the next block need to know is loaded one of them ahead: nothing waits for global memory.
    Where programs take their tiles (TAKES), it asks for them and tells the consumers.
    """
    W_GROUPS: gl.constexpr = T.taps // T.w_taps
    W_TAPS: gl.constexpr = T.w_taps
    PARTS: gl.constexpr = T.parts
    xi = 0
    wi = 0
    number = 0
    program = gl.program_id(0)
    position = program if TAKES else gl.load(program_ptr + program)
    last = gl.load(end_ptr + program) - 1
    begin, end, column = entries_at(work, position)
    y0, x0, n0 = origin_at(work, position)
    row = row_at(work, position)
    while position <= last:
        half = row % T.halves
        if TAKES:
            tell(notices, told, heard, number, position, WARPS)
            number += 1
            asked = ask(counter, WARPS)
        else:
            position += 1
            following = gl.minimum(position, last)
            next_begin, next_end, first_column = entries_at(work, following)
            next_y, next_x, next_n = origin_at(work, following)
            row = row_at(work, following)
        for entry in range(begin, end):
            next_column = gl.load(indices + gl.minimum(entry + 1, end - 1))
            for step in range(T.k_steps):
                channel = column * T.block_in + step * T.tile_k
                load_input_tile(x_descs, x_buffer, x_full, x_empty, xi, y0, x0, n0, channel, T)
                xi += 1
                for group in range(W_GROUPS):
                    w_stage = wi % T.w_stages
                    mbarrier.wait(w_empty.index(w_stage), ((wi // T.w_stages) & 1) ^ 1)
                    mbarrier.expect(w_full.index(w_stage), T.w_step_bytes)
                    for part in gl.static_range(PARTS):
                        block = entry
                        if PARTS > 1:  # one past the last block where this row has none: TMA reads zeros there
                            block = gl.load(blocks + entry * PARTS + part)
                        w_row = ((block * T.k_steps + step) * T.taps + group * W_TAPS) * T.halves + half
                        for tap in gl.static_range(W_TAPS):
                            target = w_buffer.index((w_stage * W_TAPS + tap) * PARTS + part)
                            place = [(w_row + tap * T.halves) * T.weight_rows, 0]
                            tma.async_copy_global_to_shared(w_desc, place, w_full.index(w_stage), target)
                    wi += 1
            column = next_column
        if TAKES:
            position = answer(counter, asked, last, WARPS)
            following = gl.minimum(position, last)
            begin, end, column = entries_at(work, following)
            y0, x0, n0 = origin_at(work, following)
            row = row_at(work, following)
        else:
            begin = next_begin
            end = next_end
            column = first_column
            y0 = next_y
            x0 = next_x
            n0 = next_n
    if TAKES:
        tell(notices, told, heard, number, position, WARPS)
