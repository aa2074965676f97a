"""Device code of the Hopper linear layer: one TMA producer warp group, two matrix warp groups, persistent programs.

y[m, o] = epilogue(sum over kept blocks (o-block, k-block) of W[o, k] x[m, k]).

A *strip* is 64 output features: one block row of 64, half a block row of 128, or two block rows of 32. A program works
on a pair of strips and ``TILE_M`` tokens at a time; each matrix warp group owns one strip and holds its [64, TILE_M]
sums in registers. Both read the same stream of input tiles, so that an input tile kept by both strips is fetched once:
fetching tiles, not multiplying, bounds a block-sparse product of 64-row blocks. The stream of a pair is its *stages*:
an input tile of 64 features, always, because the copy engine takes two cycles for a row however short it is, and under
it the weight tiles that are kept, one, two or four per strip for blocks of 64, 32 or 16 inputs. A stage's meta word
tells which (see ``linear_schedule``). Every warp group waits for and releases every stage, also those it does not use,
because a barrier's parity tells only neighbouring phases apart.

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
    """Fills the ring: a stage is an input tile [TILE_M, 64] and the kept weight tiles [64 / PARTS, TILE_K] under it."""
    TILES: gl.constexpr = 2 * GROUP * PARTS
    X_BYTES: gl.constexpr = TILE_M * 64 * xbuf.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = 64 * TILE_K * xbuf.dtype.primitive_bitwidth // 8
    it = 0
    for position in range(gl.load(program_ptr + gl.program_id(0)), gl.load(program_ptr + gl.program_id(0) + 1)):
        task = gl.load(tasks + position)
        pair = pairs + (task % n_pairs) * 8
        token = (task // n_pairs) * TILE_M
        entry = entries + gl.load(pair) * (2 + TILES)
        for _ in range(gl.load(pair + 1)):
            st = it % STAGES
            bar = full.index(st)
            k = gl.load(entry)
            kept = gl.load(entry + 1) >> 8
            rows = ()
            for i in gl.static_range(TILES):
                rows = rows + (gl.load(entry + 2 + i),)  # noqa: RUF005 (Triton knows no star)
            mbarrier.wait(empty.index(st), ((it // STAGES) & 1) ^ 1)
            for n in gl.static_range(1, 2 * GROUP + 1):
                mbarrier.expect(bar, X_BYTES + n * W_BYTES, pred=kept == n)
            tma.async_copy_global_to_shared(x_desc, [token, k], bar, xbuf.index(st))
            for i in gl.static_range(TILES):
                column = (k + (i // PARTS % GROUP) * TILE_K) % BLOCK_IN
                slot = wbuf.index(st * TILES + i)
                tma.async_copy_global_to_shared(w_desc, [rows[i], column], bar, slot, pred=rows[i] >= 0)
            entry += 2 + TILES
            it += 1


@gluon.jit
def _multiply(acc, x, wbuf, first, G0: gl.constexpr, G1: gl.constexpr, TILE_K: gl.constexpr, PARTS: gl.constexpr):
    """acc + W x over the sub-tiles G0 to G1 of a stage; done on return."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        TILE_K * x.dtype.primitive_bitwidth // 8, x.dtype.primitive_bitwidth, rank=2
    )
    for g in gl.static_range(G0, G1):
        w = wbuf.index(first + g * PARTS)._reinterpret(x.dtype, [64, TILE_K], LAYOUT)
        acc = warpgroup_mma(w, x.slice(g * TILE_K, TILE_K, dim=1).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _multiply_two(acc, x, wbuf, first, mask, G0: gl.constexpr, TILE_K: gl.constexpr, PARTS: gl.constexpr):
    """The same over those of the sub-tiles G0 and G0 + 1 that ``mask`` names."""
    if mask == 3:
        acc = _multiply(acc, x, wbuf, first, G0, G0 + 2, TILE_K, PARTS)
    elif mask == 1:
        acc = _multiply(acc, x, wbuf, first, G0, G0 + 1, TILE_K, PARTS)
    elif mask == 2:
        acc = _multiply(acc, x, wbuf, first, G0 + 1, G0 + 2, TILE_K, PARTS)
    return acc


@gluon.jit
def _consumer(
    y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full, empty, rbar,
    WG: gl.constexpr, TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """One strip of every task: multiply the kept tiles of every stage, release the stage, store the sums."""
    TILES: gl.constexpr = 2 * GROUP * PARTS
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
        entry = entries + gl.load(pair) * (2 + TILES) + 1
        mask = gl.load(entry)
        acc = gl.zeros((64, TILE_M), gl.float32, ACC)
        for _ in range(gl.load(pair + 1)):
            entry += 2 + TILES
            next_mask = gl.load(entry)  # of the stage after this one: its latency passes behind the products
            mine = (mask >> (4 * WG)) & 15
            st = it % STAGES
            mbarrier.wait(full.index(st), (it // STAGES) & 1)
            x = xbuf.index(st)
            first = (st * 2 + WG) * GROUP * PARTS
            if GROUP == 1:
                if mine != 0:
                    acc = _multiply(acc, x, wbuf, first, 0, 1, TILE_K, PARTS)
            elif GROUP == 2:
                acc = _multiply_two(acc, x, wbuf, first, mine, 0, TILE_K, PARTS)
            elif mine == 15:
                acc = _multiply(acc, x, wbuf, first, 0, 4, TILE_K, PARTS)
            else:
                acc = _multiply_two(acc, x, wbuf, first, mine & 3, 0, TILE_K, PARTS)
                acc = _multiply_two(acc, x, wbuf, first, mine >> 2, 2, TILE_K, PARTS)
            mbarrier.arrive(empty.index(st))
            mask = next_mask
            it += 1

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
                        feature = gl.load(pair + 2 + WG * PARTS + part)
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
                    feature = gl.load(pair + 2 + WG * PARTS + part)
                    tma.async_copy_shared_to_global(y_desc, [first, feature], ybuf.index(slot + part))
    tma.store_wait(0)


@gluon.jit
def block_sparse_linear_kernel(
    x_desc, w_desc, y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out,
    TILE_M: gl.constexpr, TILE_K: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr, BLOCK_IN: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr, PRODUCER_WARPS: gl.constexpr = 1,
):  # fmt: skip
    """Entry point; see the module's docstring."""
    DTYPE: gl.constexpr = x_desc.dtype
    xbuf = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_M, 64], x_desc.layout)
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
            (_consumer, (y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full,
                         empty, rbar, 0, TILE_M, TILE_K, GROUP, PARTS, STAGES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_consumer, (y_desc, r_desc, bias, pairs, entries, program_ptr, tasks, n_pairs, n_out, xbuf, wbuf, ybuf, full,
                         empty, rbar, 1, TILE_M, TILE_K, GROUP, PARTS, STAGES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)),
            (_producer, (x_desc, w_desc, pairs, entries, program_ptr, tasks, n_pairs, xbuf, wbuf, full, empty,
                         TILE_M, TILE_K, GROUP, PARTS, BLOCK_IN, STAGES)),
        ],
        [4, PRODUCER_WARPS],
        [232, 40],
    )  # fmt: skip
