"""Device code of the Hopper linear layer for narrow blocks: tokens as rows of the product, whole input tiles.

y[m, o] = epilogue(sum over kept blocks (o-block, k-block) of x[m, k] W[o, k]).

Where small kept blocks lie scattered, tiles of 64 outputs by hundreds of tokens (see ``linear_device``) multiply zeros
and fetch inputs for few products. Here a task is 128 tokens and a *group* of up to TILE_O outputs in strips of ``N``, a
strip being a block row or, of taller ones, 64 or 128 outputs. Its *stages* are all inputs that any strip keeps, 64 at a
time, fetched once for all of them; every strip multiplies just what it keeps, [tokens x TILE_K] by [TILE_K x N], in a
branch of its own that a bit of the stage's mask opens. ptxas lets these products run in parallel as long as they are
waited for once, at the end of the stage.

Two matrix warp groups share a task. What bounds it is the chain of each: some 280 clocks a stage, 22 for every branch,
taken or not, and what its own products take, because an instruction whose left operand lies in registers holds its
warps back until it runs. (From shared memory, which delivers 128 bytes a clock, it would take half as long again with
32 outputs.) So weight tiles of ``FEW_BRANCHES`` weights and more, of which a stage could hold 12 at most, are
multiplied by 64 tokens in each warp group (HALVES = 1: a branch for every tile, the tokens are read once), smaller ones
by all 128, each warp group taking half of the strips (HALVES = 2: half as many branches, the tokens are read twice).
With 384 outputs the sums fill three quarters of all registers there are, and the latter's products are waited for after
every 32 inputs, because the tokens of the next 32 only then find room.

Weight tiles lie one behind the other in a stage, in the order of the mask's bits, those of the second warp group's
strips behind the first's; a stage has fewer places than there could be tiles, and the ring more stages for it, which
hides more of what fetching takes.

A weight tile is fetched as rows of 128 bytes, each of them 64 / TILE_K rows of the block side by side, because the copy
engine takes as long for a shorter row. It stores the 16-byte pieces of row i in the order ``piece ^ i % 8``; read as
the tile [N, TILE_K] in wgmma's own swizzle, the pieces within a row of the tile come out in order, only rows (outputs)
have changed places: at n stands output ``n ^ (n >> 3) % (64 / TILE_K)``. The epilogue undoes that, bit 0 by naming
registers differently, bit 1 by the layout of the tile that it writes; a layout for both comes out wrong (Triton 3.6,
3.7: it adds the offsets of two registers that share a bit).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from tetris.kernels.hopper.epilogue_device import activate

PRODUCERS: gl.constexpr = gl.constexpr(3)
"""Producer warps; one would spend longer on issuing a stage's copies than the products take."""
TILE_M: gl.constexpr = gl.constexpr(128)
GROUP_FIELDS: gl.constexpr = gl.constexpr(5)
MASK_BITS: gl.constexpr = gl.constexpr(24)
"""Of a stage's mask, below the number of the first warp group's weight tiles."""
COUNT_BITS: gl.constexpr = gl.constexpr(5)
"""Of the number of weight tiles in a stage, 24 at most."""


@gluon.jit
def _producer(
    x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
    WHO: gl.constexpr, PLACES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills every PRODUCERS-th stage of the ring: 64 inputs of TILE_M tokens and the kept weight tiles."""
    ITEM: gl.constexpr = xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = wbuf.shape[1] * 64 * ITEM
    WIDTH: gl.constexpr = 3 + PLACES
    before = 0  # stages of the tasks before
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        group = groups + (task % n_groups) * GROUP_FIELDS
        token = (task // n_groups) * TILE_M
        first = entries + gl.load(group) * WIDTH
        n_stages = gl.load(group + 1)
        for i in range((WHO + (PRODUCERS - 1) * before) % PRODUCERS, n_stages, PRODUCERS):
            entry = first + i * WIDTH
            k = gl.load(entry)
            count = gl.load(entry + 1)
            st = (before + i) % STAGES
            bar = full.index(st)
            mbarrier.wait(empty.index(st), (((before + i) // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, TILE_M * 64 * ITEM)
            for bit in gl.static_range(COUNT_BITS):  # the number of bytes is a constant in every call
                mbarrier.expect(bar, W_BYTES << bit, pred=(count >> bit) & 1 == 1)
                mbarrier.arrive(bar, count=1, pred=(count >> bit) & 1 == 0)
            tma.async_copy_global_to_shared(x_desc, [token, k], bar, xbuf.index(st))
            for j in range(count):
                tma.async_copy_global_to_shared(w_desc, [gl.load(entry + 3 + j), 0], bar, wbuf.index(st * PLACES + j))
        before += n_stages


@gluon.jit
def _weight_tile(wbuf, place, N: gl.constexpr, TILE_K: gl.constexpr):
    """The weight tile at ``place`` as wgmma's right operand, [TILE_K, N]."""
    BITS: gl.constexpr = wbuf.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(TILE_K * BITS // 8, BITS, rank=2)
    return wbuf.index(place)._reinterpret(wbuf.dtype, [N, TILE_K], LAYOUT).permute((1, 0))


@gluon.jit
def _multiply_strips(
    sums, x, wbuf, place, mask, WG: gl.constexpr, TILE_O: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """sums[2 s + m] + x_m W_s^T over the weight tiles of the warp group's strips that ``mask`` names; done on return.

    ``sums``: [64, N] per strip s of the warp group and half m of the tokens; ``place``: its first weight tile's.
    """
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    STRIPS: gl.constexpr = TILE_O // N // 2
    STEP: gl.constexpr = min(TILE_K, 32)  # more inputs of the tokens do not fit into the registers
    EACH: gl.constexpr = TILE_O > 256  # the tokens of a second step would not fit into the registers
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    for k in gl.static_range(0, 64, STEP):
        left = x.slice(k, STEP, dim=1)
        upper, lower = left.slice(0, 64, dim=0).load(LEFT), left.slice(64, 64, dim=0).load(LEFT)
        if k % TILE_K == 0:
            first = place
        else:
            place = first
        results = ()
        for s in gl.static_range(STRIPS):
            above = warpgroup_mma_init(sums[2 * s]) if EACH or k == 0 else sums[2 * s]
            below = warpgroup_mma_init(sums[2 * s + 1]) if EACH or k == 0 else sums[2 * s + 1]
            bit = (WG * (64 // TILE_K) + k // TILE_K) * STRIPS + s
            if mask & (1 << bit) != 0:
                right = _weight_tile(wbuf, place, N, TILE_K).slice(k % TILE_K, STEP, dim=0)
                above = warpgroup_mma(upper, right, above, is_async=True)
                below = warpgroup_mma(lower, right, below, is_async=True)
                place += 1
            results = results + (above, below)  # type: ignore[assignment]  # noqa: RUF005
        sums = results
        if EACH or k == 64 - STEP:
            sums = warpgroup_mma_wait(0, deps=sums)
    return sums


@gluon.jit
def _multiply_tokens(sums, x, wbuf, place, mask, TILE_O: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr):
    """sums[s] + x W_s^T over the weight tiles that ``mask`` names, the first at ``place``; done on return.

    ``sums``: [64, N] per strip s; ``x``: the warp group's 64 tokens.
    """
    STRIPS: gl.constexpr = TILE_O // N
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // x.dtype.primitive_bitwidth)
    tiles = ()
    for g in gl.static_range(64 // TILE_K):
        tiles = tiles + (x.slice(g * TILE_K, TILE_K, dim=1).load(LEFT),)  # type: ignore[assignment]  # noqa: RUF005
    for g in gl.static_range(64 // TILE_K):
        results = ()
        for s in gl.static_range(STRIPS):
            acc = warpgroup_mma_init(sums[s]) if g == 0 else sums[s]
            if mask & (1 << (g * STRIPS + s)) != 0:
                acc = warpgroup_mma(tiles[g], _weight_tile(wbuf, place, N, TILE_K), acc, is_async=True)
                place += 1
            results = results + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        sums = results
    return warpgroup_mma_wait(0, deps=sums)


@gluon.jit
def _output_tile(
    sums, c: gl.constexpr, m: gl.constexpr, HALVES: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Outputs 64 c to 64 c + 63 of the m-th 64 tokens; at n stands output n ^ (n >> 3) % (64 / TILE_K) & 2.

    Moves no data between threads.
    """
    if N == 32:
        both = gl.join(sums[HALVES * 2 * c + m], sums[HALVES * (2 * c + 1) + m])
        tile = gl.convert_layout(gl.reshape(gl.permute(both, (0, 2, 1)), (64, 64)), LAYOUT)
    elif N == 64:
        tile = sums[HALVES * c + m]
    else:
        halves = gl.split(gl.permute(gl.reshape(sums[HALVES * (c // 2) + m], (64, 2, 64)), (0, 2, 1)))
        tile = gl.convert_layout(halves[c % 2], LAYOUT)
    if TILE_K < 64:  # where bit 3 of n is set, neighbours n and n ^ 1 have changed places
        same, swapped = gl.split(gl.permute(gl.reshape(tile, (64, 4, 2, 4, 2)), (0, 1, 3, 4, 2)))
        left, right = gl.split(swapped)
        both = gl.permute(gl.join(same, gl.join(right, left)), (0, 1, 4, 2, 3))
        tile = gl.convert_layout(gl.reshape(both, (64, 64)), LAYOUT)
    return tile


@gluon.jit
def _store(
    sums, y_desc, r_desc, bias, token, feature, n_out, ybuf, rbar, residual_phase,
    c: gl.constexpr, WG: gl.constexpr, HALVES: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Finish and store 64 outputs of HALVES x 64 tokens, the sums' c-th; returns the residual barrier's next parity.

    A warp group has two output buffers: one for each half of its tokens, or to change between.
    """
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    N_16: gl.constexpr = 18 if TILE_K == 16 else 16  # where bit 4 of n is set, bit 1 is flipped
    OUTPUT: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, N_16], [0, 32], [1, 8], [2, N_16], [4, 32], [8, 0], [16, 0], [32, 0]],
        alignment=1024,
    )
    DTYPE: gl.constexpr = ybuf.dtype
    place: gl.constexpr = 2 * WG + (0 if HALVES == 2 else c % 2)
    tma.store_wait(0 if HALVES == 2 or c == 0 else 1)  # the tiles before have left these buffers
    if HAS_RESIDUAL:
        mbarrier.expect(rbar.index(WG), HALVES * 64 * 64 * DTYPE.primitive_bitwidth // 8)
        for m in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(r_desc, [token + 64 * m, feature], rbar.index(WG), ybuf.index(place + m))
        mbarrier.wait(rbar.index(WG), residual_phase)
        residual_phase ^= 1
    for m in gl.static_range(HALVES):
        v = _output_tile(sums, c, m, HALVES, N, TILE_K, TILE)
        slot = ybuf.index(place + m)._reinterpret(DTYPE, [64, 64], OUTPUT)
        if HAS_BIAS:  # one load a thread: the addresses of all would not fit into the registers
            n = gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
            out = feature + (n ^ ((n >> 3) & (2 if TILE_K == 16 else 0)))
            b = gl.load(bias + out, mask=out < n_out, other=0.0).to(gl.float32)
            v += gl.convert_layout(b, gl.SliceLayout(0, TILE))[None, :]
        if HAS_RESIDUAL:
            v += slot.load(TILE).to(gl.float32)
        slot.store(activate(v, ACTIVATION).to(DTYPE))
    fence_async_shared()
    for m in gl.static_range(HALVES):
        tma.async_copy_shared_to_global(y_desc, [token + 64 * m, feature], ybuf.index(place + m))
    return residual_phase


@gluon.jit
def _consumer(
    y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, HALVES: gl.constexpr, TILE_O: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr,
    PLACES: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Half of the outputs or tokens of every task: multiply what a stage keeps, release the stage, store the sums."""
    WIDTH: gl.constexpr = 3 + PLACES
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    BY_TOKENS: gl.constexpr = HALVES == 1
    it = 0
    residual_phase = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        group = groups + (task % n_groups) * GROUP_FIELDS
        token = (task // n_groups) * TILE_M + (64 * WG if BY_TOKENS else 0)
        entry = entries + gl.load(group) * WIDTH
        mask = gl.load(entry + 2)
        sums = ()
        for _ in gl.static_range(TILE_O // N):
            sums = sums + (gl.zeros((64, N), gl.float32, ACC),)  # type: ignore[assignment]  # noqa: RUF005
        for _ in range(gl.load(group + 1)):
            entry += WIDTH
            next_mask = gl.load(entry + 2)  # of the stage after this one: its latency passes behind the products
            st = it % STAGES
            mbarrier.wait(full.index(st), (it // STAGES) & 1)
            x = xbuf.index(st)
            if BY_TOKENS:
                x = x.slice(64 * WG, 64, dim=0)
                sums = _multiply_tokens(sums, x, wbuf, st * PLACES, mask, TILE_O, N, TILE_K)
            else:
                place = st * PLACES + (mask >> MASK_BITS if WG == 1 else 0)
                sums = _multiply_strips(sums, x, wbuf, place, mask, WG, TILE_O, N, TILE_K)
            mbarrier.arrive(empty.index(st))
            mask = next_mask
            it += 1

        begin = gl.load(group + 2 + (0 if BY_TOKENS else WG))
        end = gl.load(group + 3 + (1 if BY_TOKENS else WG))
        for c in gl.static_range(TILE_O // 64 // HALVES):
            feature = begin + 64 * c
            if feature < end:
                residual_phase = _store(
                    sums, y_desc, r_desc, bias, token, feature, n_out, ybuf, rbar, residual_phase,
                    c, WG, HALVES, N, TILE_K, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def narrow_block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out,
    HALVES: gl.constexpr, TILE_O: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr, PLACES: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_M, 64], x_desc.layout)
    wbuf = gl.allocate_shared_memory(DTYPE, [STAGES * PLACES, N * TILE_K // 64, 64], w_desc.layout)
    ybuf = gl.allocate_shared_memory(DTYPE, [4, 64, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rbar = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + COUNT_BITS)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(rbar.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 0, HALVES, TILE_O, N, TILE_K, PLACES, STAGES, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 1, HALVES, TILE_O, N, TILE_K, PLACES, STAGES, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         0, PLACES, STAGES)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         1, PLACES, STAGES)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         2, PLACES, STAGES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip
