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
    BLOCK_IN: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Fills the ring: a stage is 64 inputs of TILE_M tokens and the kept weight tiles [64 / PARTS, TILE_K]."""
    X_TILES: gl.constexpr = GROUP if GATHER else 1
    TILES: gl.constexpr = 2 * GROUP * PARTS
    X_BYTES: gl.constexpr = TILE_M * 64 * xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = 64 * TILE_K * xbuf.dtype.primitive_bitwidth // 8
    it = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        pair = pairs + (task % n_pairs) * 8
        token = (task // n_pairs) * TILE_M
        entry = entries + gl.load(pair) * (1 + X_TILES + TILES)
        for _ in range(gl.load(pair + 1)):
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
    y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """One strip of every task: multiply the kept tiles of every stage, release the stage, store the sums."""
    WIDTH: gl.constexpr = 1 + (GROUP if GATHER else 1) + 2 * GROUP * PARTS
    BITS: gl.constexpr = xbuf.dtype.primitive_bitwidth
    CHUNKS: gl.constexpr = TILE_M // 64
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M // 2, 16]
    )
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ROWS: gl.constexpr = 64 // PARTS
    Y_PARTS: gl.constexpr = gl.NVMMASharedLayout(128 // PARTS, xbuf.dtype.primitive_bitwidth, rank=3)
    PART_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4 * PARTS, 8 // PARTS], [1, 4, 1], [2, 1, 0])
    it = 0
    residual_phase = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        pair = pairs + (task % n_pairs) * 8
        token = (task // n_pairs) * TILE_M
        if HAS_BIAS:
            rows = gl.arange(0, 64, gl.SliceLayout(1, CHUNK))
            out = gl.load(pair + 2 + WG * PARTS + rows // ROWS) + rows % ROWS
        entry = entries + gl.load(pair) * WIDTH
        mask = gl.load(entry)
        acc = gl.zeros((64, TILE_M), gl.float32, ACC)
        for _ in range(gl.load(pair + 1)):
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

        tma.store_wait(0)  # the task before has left the output buffer
        if HAS_RESIDUAL:
            mbarrier.expect(rbar.index(WG), 64 * TILE_M * BITS // 8)
            for i in gl.static_range(CHUNKS * PARTS):
                feature = gl.load(pair + 2 + WG * PARTS + i % PARTS)
                slot = ybuf.index(WG * CHUNKS * PARTS + i)
                tma.async_copy_global_to_shared(r_desc, [token + i // PARTS * 64, feature], rbar.index(WG), slot)
            mbarrier.wait(rbar.index(WG), residual_phase)
            residual_phase ^= 1
        for c in gl.static_range(CHUNKS):
            if TILE_M == 256:
                v = _token_halves(_token_halves(acc, 128, HALF)[c // 2], 64, CHUNK)[c % 2]
            else:
                v = _token_halves(acc, 64, CHUNK)[c]
            out_tile = ybuf.index((WG * CHUNKS + c) * PARTS)._reinterpret(xbuf.dtype, [PARTS, 64, ROWS], Y_PARTS)
            if HAS_BIAS:
                v += gl.load(bias + out, mask=out < n_out, other=0.0).to(gl.float32)[:, None]
            if HAS_RESIDUAL:
                r = gl.reshape(gl.permute(out_tile.load(PART_LAYOUT), (0, 2, 1)), (64, 64))
                v += gl.convert_layout(r, CHUNK).to(gl.float32)
            v = activate(v, ACTIVATION).to(xbuf.dtype)
            out_tile.store(gl.permute(gl.reshape(v, (PARTS, ROWS, 64)), (0, 2, 1)))
        fence_async_shared()
        for i in gl.static_range(CHUNKS * PARTS):
            feature = gl.load(pair + 2 + WG * PARTS + i % PARTS)
            slot = ybuf.index(WG * CHUNKS * PARTS + i)
            tma.async_copy_shared_to_global(y_desc, [token + i // PARTS * 64, feature], slot)
    tma.store_wait(0)


@gluon.jit
def block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr, BLOCK_IN: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    X_TILES: gl.constexpr = GROUP if GATHER else 1
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES * X_TILES, TILE_M, 64 // X_TILES], x_desc.layout)
    wbuf = gl.allocate_shared_memory(DTYPE, [STAGES * 2 * GROUP * PARTS, 64 // PARTS, TILE_K], w_desc.layout)
    ybuf = gl.allocate_shared_memory(DTYPE, [TILE_M // 32 * PARTS, 64, 64 // PARTS], y_desc.layout)
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
            (_consumer, (y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 0, TILE_M, TILE_K, GROUP, PARTS, STAGES, GATHER, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf,
                         full, empty, rbar, 1, TILE_M, TILE_K, GROUP, PARTS, STAGES, GATHER, HAS_BIAS, HAS_RESIDUAL,
                         ACTIVATION)),
            (_producer, (x_desc, w_desc, pairs, entries, program_ptr, tasks, n_pairs, xbuf, wbuf, full, empty,
                         TILE_M, TILE_K, GROUP, PARTS, BLOCK_IN, STAGES, GATHER)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
