"""Device code of the Hopper linear layer: one TMA producer warp group, two matrix warp groups, persistent programs.

y[m, o] = epilogue(sum over kept blocks (o-block, k-block) of W[o, k] x[m, k]).

A *strip* is 64 output features: one block row of 64, half a block row of 128, or two block rows of 32. A program works
on a pair of strips and ``TILE_M`` tokens at a time; each matrix warp group owns one strip and holds its [64, TILE_M]
sums in registers. Both read the same stream of input tiles, so that an input tile kept by both strips is fetched once:
fetching tiles, not multiplying, bounds a block-sparse product of 64-row blocks. The stream of a pair is its *stages*:
64 input features and under them the weight tiles that are kept, one, two or four per strip for blocks of 64, 32 or 16
inputs; a stage's meta word tells which. The 64 features of narrow blocks are neighbours, fetched as one tile, or
gathered from several places (GATHER), whichever the schedule found cheaper (see ``linear_schedule``).
Every warp group waits for and releases every stage, also those it does not use, because a barrier's parity tells only
neighbouring phases apart.

A task is a record of TASK_FIELDS numbers: 0 the first token, 1 the first entry, 2 the number of stages, 3 to 6 the
first output feature of up to four parts of the two strips, 7 to 9 into how many pieces its pair is cut along the inputs
and where their sums are kept, 10 the number of tasks of its program. The n-th task of program p is record
n * programs + p: its address is known, and what it needs lies side by side.

Weights are wgmma's left operand and tokens the right one, both in shared memory: with 256 tokens an instruction then
reads 80 bytes a clock of the 128 that shared memory delivers.
"""

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

from tetris.kernels.hopper.linear_finish_device import finish, leave_piece

TASK_FIELDS: gl.constexpr = gl.constexpr(16)


@gluon.jit
def _producer(
    x_desc, w_desc, entries, tasks, xbuf, wbuf, full, empty,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    BLOCK_IN: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Fills the ring: a stage is 64 inputs of TILE_M tokens and the kept weight tiles [64 / PARTS, TILE_K]."""
    X_TILES: gl.constexpr = GROUP if GATHER else 1
    TILES: gl.constexpr = 2 * GROUP * PARTS
    X_BYTES: gl.constexpr = TILE_M * 64 * xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = 64 * TILE_K * xbuf.dtype.primitive_bitwidth // 8
    it = 0
    for turn in range(gl.load(tasks + gl.program_id(0) * TASK_FIELDS + 10)):
        task = tasks + (turn * gl.num_programs(0) + gl.program_id(0)) * TASK_FIELDS
        token = gl.load(task)
        entry = entries + gl.load(task + 1) * (1 + X_TILES + TILES)
        for _ in range(gl.load(task + 2)):
            st = it % STAGES
            bar = full.index(st)
            kept = gl.load(entry) >> 8
            ks = ()
            for i in gl.static_range(X_TILES):
                ks = ks + (gl.load(entry + 1 + i),)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no star)
            rows = ()
            for i in gl.static_range(TILES):
                rows = rows + (gl.load(entry + 1 + X_TILES + i),)  # type: ignore[assignment]  # noqa: RUF005
            mbarrier.wait(empty.index(st), ((it // STAGES) & 1) ^ 1)
            for n in gl.static_range(1, 2 * GROUP + 1):
                mbarrier.expect(bar, X_BYTES + n * W_BYTES, pred=kept == n)
            for i in gl.static_range(X_TILES):
                tma.async_copy_global_to_shared(x_desc, [token, ks[i]], bar, xbuf.index(st * X_TILES + i))
            column = ks[0] % BLOCK_IN if GROUP == 1 else 0  # type: ignore[misc]
            for i in gl.static_range(TILES):
                slot = wbuf.index(st * TILES + i)
                tma.async_copy_global_to_shared(w_desc, [rows[i], column], bar, slot, pred=rows[i] >= 0)
            entry += 1 + X_TILES + TILES
            it += 1


@gluon.jit
def _multiply(
    acc, xbuf, wbuf, stage, WG: gl.constexpr, G0: gl.constexpr, G1: gl.constexpr, GROUP: gl.constexpr,
    TILE_K: gl.constexpr, PARTS: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """acc + W x over the weight tiles G0 to G1 of a stage; done on return."""
    BITS: gl.constexpr = xbuf.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(TILE_K * BITS // 8, BITS, rank=2)
    for g in gl.static_range(G0, G1):
        if GATHER:
            x = xbuf.index(stage * GROUP + g)
        else:
            x = xbuf.index(stage).slice(g * TILE_K, TILE_K, dim=1)
        w = wbuf.index(((stage * 2 + WG) * GROUP + g) * PARTS)._reinterpret(xbuf.dtype, [64, TILE_K], LAYOUT)
        acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _multiply_two(
    acc, xbuf, wbuf, stage, mask, WG: gl.constexpr, G0: gl.constexpr, GROUP: gl.constexpr,
    TILE_K: gl.constexpr, PARTS: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """The same over those of the weight tiles G0 and G0 + 1 that ``mask`` names."""
    if mask == 3:
        acc = _multiply(acc, xbuf, wbuf, stage, WG, G0, G0 + 2, GROUP, TILE_K, PARTS, GATHER)
    elif mask == 1:
        acc = _multiply(acc, xbuf, wbuf, stage, WG, G0, G0 + 1, GROUP, TILE_K, PARTS, GATHER)
    elif mask == 2:
        acc = _multiply(acc, xbuf, wbuf, stage, WG, G0 + 1, G0 + 2, GROUP, TILE_K, PARTS, GATHER)
    return acc


@gluon.jit
def _consumer(
    y_desc, r_desc, bias, entries, tasks, counters, workspace, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """One strip of every task: multiply the kept tiles of every stage, release the stage, store the sums."""
    WIDTH: gl.constexpr = 1 + (GROUP if GATHER else 1) + 2 * GROUP * PARTS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 16])
    it = 0
    residual_phase = 0
    for turn in range(gl.load(tasks + gl.program_id(0) * TASK_FIELDS + 10)):
        task = tasks + (turn * gl.num_programs(0) + gl.program_id(0)) * TASK_FIELDS
        entry = entries + gl.load(task + 1) * WIDTH
        mask = gl.load(entry)
        acc = gl.zeros((64, TILE_M), gl.float32, ACC)
        for _ in range(gl.load(task + 2)):
            entry += WIDTH
            next_mask = gl.load(entry)  # of the stage after this one: its latency passes behind the products
            mine = (mask >> (4 * WG)) & 15
            st = it % STAGES
            mbarrier.wait(full.index(st), (it // STAGES) & 1)
            if GROUP == 1:
                if mine != 0:
                    acc = _multiply(acc, xbuf, wbuf, st, WG, 0, 1, GROUP, TILE_K, PARTS, GATHER)
            elif GROUP == 2:
                acc = _multiply_two(acc, xbuf, wbuf, st, mine, WG, 0, GROUP, TILE_K, PARTS, GATHER)
            elif mine == 15:
                acc = _multiply(acc, xbuf, wbuf, st, WG, 0, 4, GROUP, TILE_K, PARTS, GATHER)
            else:
                acc = _multiply_two(acc, xbuf, wbuf, st, mine & 3, WG, 0, GROUP, TILE_K, PARTS, GATHER)
                acc = _multiply_two(acc, xbuf, wbuf, st, mine >> 2, WG, 2, GROUP, TILE_K, PARTS, GATHER)
            mbarrier.arrive(empty.index(st))
            mask = next_mask
            it += 1

        pieces = gl.load(task + 7)
        if pieces == 1:
            residual_phase = finish(
                acc, workspace, y_desc, r_desc, bias, task, pieces, n_out, ybuf, rbar, residual_phase,
                WG, TILE_M, PARTS, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
        elif leave_piece(acc, workspace, counters, task, pieces, WG, TILE_M):
            residual_phase = finish(
                acc, workspace, y_desc, r_desc, bias, task, pieces, n_out, ybuf, rbar, residual_phase,
                WG, TILE_M, PARTS, True, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, entries, tasks, counters, workspace, n_out,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr, BLOCK_IN: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    X_TILES: gl.constexpr = GROUP if GATHER else 1
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES * X_TILES, TILE_M, 64 // X_TILES], x_desc.layout)
    wbuf = gl.allocate_shared_memory(DTYPE, [STAGES * 2 * GROUP * PARTS, 64 // PARTS, TILE_K], w_desc.layout)
    Y_SLOTS: gl.constexpr = TILE_M // 64 if HAS_RESIDUAL else 2
    ybuf = gl.allocate_shared_memory(DTYPE, [2 * Y_SLOTS * PARTS, 64, 64 // PARTS], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rbar = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(rbar.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (y_desc, r_desc, bias, entries, tasks, counters, workspace, n_out, xbuf, wbuf, ybuf, full,
                         empty, rbar, 0, TILE_M, TILE_K, GROUP, PARTS, STAGES, GATHER, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, entries, tasks, counters, workspace, n_out, xbuf, wbuf, ybuf, full,
                         empty, rbar, 1, TILE_M, TILE_K, GROUP, PARTS, STAGES, GATHER, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_producer, (x_desc, w_desc, entries, tasks, xbuf, wbuf, full, empty,
                         TILE_M, TILE_K, GROUP, PARTS, BLOCK_IN, STAGES, GATHER)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
