"""Device code of the Hopper linear layer: one TMA producer warp group, two matrix warp groups, persistent programs.

y[m, o] = epilogue(sum over kept blocks (o-block, k-block) of W[o, k] x[m, k]).

A *strip* is 64 output features: one block row of 64, half a block row of 128, or two block rows of 32. A program works
on a pair of strips and ``TILE_M`` tokens at a time; each matrix warp group owns one strip and holds its [64, TILE_M]
sums in registers. Both read the same stream of input tiles, so that an input tile kept by both strips is fetched once:
fetching tiles, not multiplying, bounds a block-sparse product of 64-row blocks. The stream of a pair is its *stages*
(64 input features each), in three parts: kept by both strips, then alternately by strip 0 and strip 1, then by the
longer one alone (see ``linear_schedule``). Every warp group waits for and releases every stage, also those it does not
use, because a barrier's parity tells only neighbouring phases apart.

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

from tetris.kernels.hopper.epilogue_device import activate


@gluon.jit
def _token_halves(acc, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Both token halves of ``acc`` [64, 2 * HALF] as [64, HALF] each; moves no data between threads."""
    a, b = gl.split(gl.permute(gl.reshape(acc, (64, 2, HALF)), (0, 2, 1)))
    return gl.convert_layout(a, LAYOUT), gl.convert_layout(b, LAYOUT)


@gluon.jit
def _producer(
    x_desc, w_desc, pairs, entries, program_ptr, tasks, n_pairs, xbuf, wbuf, full, empty,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    BLOCK_IN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring: a stage is GROUP input tiles [TILE_M, TILE_K] and the weight tiles of strips that keep them."""
    WIDTH: gl.constexpr = 1 + 2 * PARTS
    X_BYTES: gl.constexpr = GROUP * TILE_M * TILE_K * xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = GROUP * 64 * TILE_K * xbuf.dtype.primitive_bitwidth // 8
    it = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        pair = pairs + (task % n_pairs) * 8
        token = (task // n_pairs) * TILE_M
        entry = entries + gl.load(pair) * WIDTH
        shared = gl.load(pair + 1)
        n_stages = shared + gl.load(pair + 2) + gl.load(pair + 3)
        for s in range(n_stages):
            st = it % STAGES
            bar = full.index(st)
            mbarrier.wait(empty.index(st), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, X_BYTES + 2 * W_BYTES, pred=s < shared)
            mbarrier.expect(bar, X_BYTES + W_BYTES, pred=s >= shared)
            for g in gl.static_range(GROUP):
                k = gl.load(entry + g * WIDTH)
                tma.async_copy_global_to_shared(x_desc, [token, k], bar, xbuf.index(st * GROUP + g))
                for strip in gl.static_range(2):
                    for part in gl.static_range(PARTS):
                        row = gl.load(entry + g * WIDTH + 1 + strip * PARTS + part)
                        slot = wbuf.index(((st * 2 + strip) * GROUP + g) * PARTS + part)
                        tma.async_copy_global_to_shared(w_desc, [row, k % BLOCK_IN], bar, slot, pred=row >= 0)
            entry += GROUP * WIDTH
            it += 1


@gluon.jit
def _consumer(
    y_desc, r_desc, bias, pairs, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """One strip of every task: multiply the stages that keep it, release all of them, store the sums."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M // 2, 16]
    )
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    W_TILE: gl.constexpr = gl.NVMMASharedLayout(
        TILE_K * xbuf.dtype.primitive_bitwidth // 8, xbuf.dtype.primitive_bitwidth, rank=2
    )
    ROWS: gl.constexpr = 64 // PARTS
    Y_PARTS: gl.constexpr = gl.NVMMASharedLayout(128 // PARTS, xbuf.dtype.primitive_bitwidth, rank=3)
    PART_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4 * PARTS, 8 // PARTS], [1, 4, 1], [2, 1, 0])
    it = 0
    residual_phase = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        pair = pairs + (task % n_pairs) * 8
        token = (task // n_pairs) * TILE_M
        shared = gl.load(pair + 1)
        own0 = gl.load(pair + 2)
        own1 = gl.load(pair + 3)
        both = gl.minimum(own0, own1)
        if HAS_BIAS:
            rows = gl.arange(0, 64, gl.SliceLayout(1, CHUNK))
            out = gl.load(pair + 4 + WG * PARTS + rows // ROWS) + rows % ROWS
        if WG == 0:
            n_used = shared + own0
        else:
            n_used = shared + own1
        acc = gl.zeros((64, TILE_M), gl.float32, ACC)
        previous = 0
        for j in range(n_used):
            alternating = (j >= shared) & (j < shared + both)
            if WG == 1:  # pass over strip 0's stage
                mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1, pred=alternating)
                mbarrier.arrive(empty.index(it % STAGES), pred=alternating)
                it += alternating.to(gl.int32)
            st = it % STAGES
            mbarrier.wait(full.index(st), (it // STAGES) & 1)
            for g in gl.static_range(GROUP):
                x = xbuf.index(st * GROUP + g).permute((1, 0))
                w = wbuf.index(((st * 2 + WG) * GROUP + g) * PARTS)._reinterpret(xbuf.dtype, [64, TILE_K], W_TILE)
                acc = warpgroup_mma(w, x, acc, is_async=True)
            if IN_FLIGHT:  # release the stage before this one, whose products are certainly done
                acc = warpgroup_mma_wait(GROUP, deps=(acc,))
                mbarrier.arrive(empty.index(previous), pred=j > 0)
                previous = st
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(st))
            it += 1
            if WG == 0:  # pass over strip 1's stage
                mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1, pred=alternating)
                mbarrier.arrive(empty.index(it % STAGES), pred=alternating)
                it += alternating.to(gl.int32)

        if IN_FLIGHT:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(previous), pred=n_used > 0)

        for h in gl.static_range(TILE_M // 128):
            if TILE_M == 256:
                chunks = _token_halves(_token_halves(acc, 128, HALF)[h], 64, CHUNK)
            else:
                chunks = _token_halves(acc, 64, CHUNK)
            for c in gl.static_range(2):
                first = token + (h * 2 + c) * 64
                slot = (WG * 2 + c) * PARTS
                stage = ybuf.index(slot)._reinterpret(xbuf.dtype, [PARTS, 64, ROWS], Y_PARTS)
                tma.store_wait(PARTS)
                v = chunks[c]
                if HAS_BIAS:
                    v += gl.load(bias + out, mask=out < n_out, other=0.0).to(gl.float32)[:, None]
                if HAS_RESIDUAL:
                    mbarrier.expect(rbar.index(WG), 64 * 64 * xbuf.dtype.primitive_bitwidth // 8)
                    for part in gl.static_range(PARTS):
                        feature = gl.load(pair + 4 + WG * PARTS + part)
                        tma.async_copy_global_to_shared(
                            r_desc, [first, feature], rbar.index(WG), ybuf.index(slot + part)
                        )
                    mbarrier.wait(rbar.index(WG), residual_phase)
                    residual_phase ^= 1
                    r = gl.reshape(gl.permute(stage.load(PART_LAYOUT), (0, 2, 1)), (64, 64))
                    v += gl.convert_layout(r, CHUNK).to(gl.float32)
                v = activate(v, ACTIVATION).to(xbuf.dtype)
                stage.store(gl.permute(gl.reshape(v, (PARTS, ROWS, 64)), (0, 2, 1)))
                fence_async_shared()
                for part in gl.static_range(PARTS):
                    feature = gl.load(pair + 4 + WG * PARTS + part)
                    tma.async_copy_shared_to_global(y_desc, [first, feature], ybuf.index(slot + part))
        for _ in range(shared + own0 + own1 - n_used - both):  # pass over the other strip's tail
            mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
            mbarrier.arrive(empty.index(it % STAGES))
            it += 1
    tma.store_wait(0)


@gluon.jit
def block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr, BLOCK_IN: gl.constexpr,
    STAGES: gl.constexpr, IN_FLIGHT: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES * GROUP, TILE_M, TILE_K], x_desc.layout)
    wbuf = gl.allocate_shared_memory(DTYPE, [STAGES * 2 * GROUP * PARTS, 64 // PARTS, TILE_K], w_desc.layout)
    ybuf = gl.allocate_shared_memory(DTYPE, [4 * PARTS, 64, 64 // PARTS], y_desc.layout)
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
            (_consumer, (y_desc, r_desc, bias, pairs, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full, empty,
                         rbar, 0, TILE_M, TILE_K, GROUP, PARTS, STAGES, IN_FLIGHT, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, pairs, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full, empty,
                         rbar, 1, TILE_M, TILE_K, GROUP, PARTS, STAGES, IN_FLIGHT, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_producer, (x_desc, w_desc, pairs, entries, program_ptr, tasks, n_pairs, xbuf, wbuf, full, empty,
                         TILE_M, TILE_K, GROUP, PARTS, BLOCK_IN, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip
