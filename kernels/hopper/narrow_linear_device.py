"""Device code of the Hopper linear layer for narrow blocks: tokens as rows of the product, whole input tiles.

y[m, o] = epilogue(sum over kept blocks (o-block, k-block) of x[m, k] W[o, k]).

Where small kept blocks lie scattered, tiles of 64 outputs by hundreds of tokens (see ``linear_device``) multiply zeros
and fetch inputs for few products. Here a task is 128 tokens and a *group* of ``STRIPS`` strips of ``N`` outputs, a
strip being a block row of 32 or 64 outputs of a taller one. Its *stages* are all inputs that any strip keeps, 64 at a
time, fetched once for all of them; every strip multiplies just what it keeps, [64 tokens x TILE_K] by [TILE_K x N], in
a branch of its own that a bit of the stage's mask opens. ptxas lets these products run in parallel as long as they are
waited for once, at the end of the stage. Both matrix warp groups use all weights of a stage; each owns 64 tokens.

The tokens' tile is loaded into registers once a stage: shared memory delivers 128 bytes a clock, and 32 outputs with
both operands there would take half as long again as the product.

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
ROUND: gl.constexpr = gl.constexpr(2)
"""Output tiles of 64 features that a warp group stores at a time."""
TILE_M: gl.constexpr = gl.constexpr(128)


@gluon.jit
def _producer(
    x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
    WHO: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills every PRODUCERS-th stage of the ring: 64 inputs of TILE_M tokens and up to SLOTS weight tiles."""
    ITEM: gl.constexpr = xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = wbuf.shape[1] * 64 * ITEM
    WIDTH: gl.constexpr = 3 + SLOTS
    before = 0  # stages of the tasks before
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        group = groups + (task % n_groups) * 4
        token = (task // n_groups) * TILE_M
        first = entries + gl.load(group) * WIDTH
        n_stages = gl.load(group + 1)
        for i in range((WHO + (PRODUCERS - 1) * before) % PRODUCERS, n_stages, PRODUCERS):
            entry = first + i * WIDTH
            k = gl.load(entry)
            count = gl.load(entry + 1)
            lines = ()
            for slot in gl.static_range(SLOTS):
                lines = lines + (gl.load(entry + 3 + slot),)  # type: ignore[assignment]  # noqa: RUF005
            st = (before + i) % STAGES
            bar = full.index(st)
            mbarrier.wait(empty.index(st), (((before + i) // STAGES) & 1) ^ 1)
            for n in gl.static_range(1, SLOTS + 1):
                mbarrier.expect(bar, TILE_M * 64 * ITEM + n * W_BYTES, pred=count == n)
            tma.async_copy_global_to_shared(x_desc, [token, k], bar, xbuf.index(st))
            for slot in gl.static_range(SLOTS):
                target = wbuf.index(st * SLOTS + slot)
                tma.async_copy_global_to_shared(w_desc, [lines[slot], 0], bar, target, pred=slot < count)
        before += n_stages


@gluon.jit
def _multiply(sums, x, wbuf, slot, mask, N: gl.constexpr, STRIPS: gl.constexpr, TILE_K: gl.constexpr):
    """sums[s] + x W_s^T for the weight tiles of a stage that ``mask`` names, the first at ``slot``; done on return."""
    BITS: gl.constexpr = x.dtype.primitive_bitwidth
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    RIGHT: gl.constexpr = gl.NVMMASharedLayout(TILE_K * BITS // 8, BITS, rank=2)
    for g in gl.static_range(64 // TILE_K):
        left = x.slice(g * TILE_K, TILE_K, dim=1).load(LEFT)
        results = ()
        for s in gl.static_range(STRIPS):
            acc = warpgroup_mma_init(sums[s]) if g == 0 else sums[s]
            kept = (mask >> (g * STRIPS + s)) & 1
            if kept != 0:
                right = wbuf.index(slot)._reinterpret(x.dtype, [N, TILE_K], RIGHT)
                acc = warpgroup_mma(left, right.permute((1, 0)), acc, is_async=True)
            slot += kept
            results = results + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        sums = results
    return warpgroup_mma_wait(0, deps=sums)


@gluon.jit
def _output_tile(sums, c: gl.constexpr, N: gl.constexpr, TILE_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Output tile c [64, 64] of the strips' sums, n there being output n ^ (n >> 3) % (64 / TILE_K) & 2.

    Moves no data between threads.
    """
    if N == 64:
        tile = sums[c]
    else:
        both = gl.permute(gl.join(sums[2 * c], sums[2 * c + 1]), (0, 2, 1))
        tile = gl.convert_layout(gl.reshape(both, (64, 64)), LAYOUT)
    if TILE_K < 64:  # where bit 3 of n is set, neighbours n and n ^ 1 have changed places
        same, swapped = gl.split(gl.permute(gl.reshape(tile, (64, 4, 2, 4, 2)), (0, 1, 3, 4, 2)))
        left, right = gl.split(swapped)
        both = gl.permute(gl.join(same, gl.join(right, left)), (0, 1, 4, 2, 3))
        tile = gl.convert_layout(gl.reshape(both, (64, 64)), LAYOUT)
    return tile


@gluon.jit
def _consumer(
    y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, N: gl.constexpr, STRIPS: gl.constexpr, TILE_K: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """64 tokens of every task: multiply what every stage keeps, release the stage, store the sums."""
    WIDTH: gl.constexpr = 3 + SLOTS
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    N_16: gl.constexpr = 18 if TILE_K == 16 else 16  # where bit 4 of n is set, bit 1 is flipped
    OUTPUT: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, N_16], [0, 32], [1, 8], [2, N_16], [4, 32], [8, 0], [16, 0], [32, 0]],
        alignment=1024,
    )
    it = 0
    residual_phase = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        group = groups + (task % n_groups) * 4
        token = (task // n_groups) * TILE_M + 64 * WG
        entry = entries + gl.load(group) * WIDTH
        feature, end = gl.load(group + 2), gl.load(group + 3)
        mask = gl.load(entry + 2)
        sums = ()
        for _ in gl.static_range(STRIPS):
            sums = sums + (gl.zeros((64, N), gl.float32, ACC),)  # type: ignore[assignment]  # noqa: RUF005
        for _ in range(gl.load(group + 1)):
            entry += WIDTH
            next_mask = gl.load(entry + 2)  # of the stage after this one: its latency passes behind the products
            st = it % STAGES
            mbarrier.wait(full.index(st), (it // STAGES) & 1)
            x = xbuf.index(st).slice(64 * WG, 64, dim=0)
            sums = _multiply(sums, x, wbuf, st * SLOTS, mask, N, STRIPS, TILE_K)
            mbarrier.arrive(empty.index(st))
            mask = next_mask
            it += 1

        for tile in gl.static_range(0, STRIPS * N // 64, ROUND):
            tma.store_wait(0)  # the tiles before have left the output buffer
            if HAS_RESIDUAL:
                mbarrier.expect(rbar.index(WG), ROUND * 64 * 64 * xbuf.dtype.primitive_bitwidth // 8)
                for i in gl.static_range(ROUND):
                    where = feature + 64 * (tile + i)
                    slot = ybuf.index(WG * ROUND + i)
                    tma.async_copy_global_to_shared(r_desc, [token, where], rbar.index(WG), slot)
                mbarrier.wait(rbar.index(WG), residual_phase)
                residual_phase ^= 1
            for i in gl.static_range(ROUND):
                v = _output_tile(sums, tile + i, N, TILE_K, TILE)
                slot = ybuf.index(WG * ROUND + i)._reinterpret(xbuf.dtype, [64, 64], OUTPUT)
                if HAS_BIAS:  # one load a thread: the addresses of all would not fit into the registers
                    n = gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
                    out = feature + 64 * (tile + i) + (n ^ ((n >> 3) & (2 if TILE_K == 16 else 0)))
                    b = gl.load(bias + out, mask=out < n_out, other=0.0).to(gl.float32)
                    v += gl.convert_layout(b, gl.SliceLayout(0, TILE))[None, :]
                if HAS_RESIDUAL:
                    v += slot.load(TILE).to(gl.float32)
                slot.store(activate(v, ACTIVATION).to(xbuf.dtype))
            fence_async_shared()
            for i in gl.static_range(ROUND):
                where = feature + 64 * (tile + i)
                where = gl.where(where < end, where, n_out)  # a group of fewer strips stores no more than it has
                tma.async_copy_shared_to_global(y_desc, [token, where], ybuf.index(WG * ROUND + i))
    tma.store_wait(0)


@gluon.jit
def narrow_block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out,
    N: gl.constexpr, STRIPS: gl.constexpr, TILE_K: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_M, 64], x_desc.layout)
    wbuf = gl.allocate_shared_memory(DTYPE, [STAGES * SLOTS, N * TILE_K // 64, 64], w_desc.layout)
    ybuf = gl.allocate_shared_memory(DTYPE, [2 * ROUND, 64, 64], y_desc.layout)
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
            (_consumer, (y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 0, N, STRIPS, TILE_K, SLOTS, STAGES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, groups, entries, program_ptr, tasks, n_groups, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 1, N, STRIPS, TILE_K, SLOTS, STAGES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         0, SLOTS, STAGES)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         1, SLOTS, STAGES)),
            (_producer, (x_desc, w_desc, groups, entries, program_ptr, tasks, n_groups, xbuf, wbuf, full, empty,
                         2, SLOTS, STAGES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip
