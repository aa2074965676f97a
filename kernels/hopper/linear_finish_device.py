"""What the Hopper linear layer does with a strip's sums: piece together those of a cut pair, finish, store.

A pair of strips that was cut along the inputs has its pieces summed by several programs. Each leaves its sums in the
workspace, fp32 [pieces, 2 strips, 64, TILE_M], and counts itself; the one that comes last adds all pieces in the order
of the inputs, whoever it is, and finishes the tile. The counter is zero again afterwards.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tetris.kernels.hopper.epilogue_device import activate

AT_ONCE: gl.constexpr = gl.constexpr(4)
"""Pieces whose sums are loaded together: 64 x 64 of each, 128 kB in flight in a program."""


@gluon.jit
def _token_halves(acc, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Both token halves of ``acc`` [64, 2 * HALF] as [64, HALF] each; moves no data between threads."""
    a, b = gl.split(gl.permute(gl.reshape(acc, (64, 2, HALF)), (0, 2, 1)))
    return gl.convert_layout(a, LAYOUT), gl.convert_layout(b, LAYOUT)


@gluon.jit
def _chunk_of(acc, C: gl.constexpr, TILE_M: gl.constexpr, CHUNK: gl.constexpr):
    """Tokens 64 C to 64 C + 63 of a program's own sums."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M // 2, 16]
    )
    if TILE_M == 256:
        v = _token_halves(_token_halves(acc, 128, HALF)[C // 2], 64, CHUNK)[C % 2]
    else:
        v = _token_halves(acc, 64, CHUNK)[C]
    return v


@gluon.jit
def _places(TILE_M: gl.constexpr, FIRST: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where [64, TOKENS] sums from token FIRST on lie in a strip's piece: 8 x 8 of them side by side.

    Those are what one instruction of a warp stores or loads of a matrix instruction's result: 256 bytes in a row.
    """
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    tokens = FIRST + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))[None, :]
    return ((rows // 8) * (TILE_M // 8) + tokens // 8) * 64 + rows % 8 * 8 + tokens % 8


@gluon.jit
def _chunk_of_pieces(
    workspace, first, pieces, WG: gl.constexpr, C: gl.constexpr, TILE_M: gl.constexpr, CHUNK: gl.constexpr
):
    """The same tokens of the sums of all pieces, ``first`` and those after it, added in their order."""
    place = workspace + (first * 2 + WG) * (64 * TILE_M) + _places(TILE_M, C * 64, 64, CHUNK)
    v = gl.zeros((64, 64), gl.float32, CHUNK)
    for some in range(0, pieces, AT_ONCE):
        for i in gl.static_range(AT_ONCE):
            v += gl.load(place, mask=some + i < pieces, other=0.0, cache_modifier=".cg")
            place += 2 * 64 * TILE_M
    return v


@gluon.jit
def leave_piece(acc, workspace, counters, task, pieces, WG: gl.constexpr, TILE_M: gl.constexpr):
    """Stores the sums of one piece; whether it is the last of its pair's pieces, which may then read all of them."""
    LAYOUT: gl.constexpr = acc.type.layout
    place = (gl.load(task + 9) * 2 + WG) * (64 * TILE_M) + _places(TILE_M, 0, TILE_M, LAYOUT)
    gl.store(workspace + place, acc)
    counter = counters + gl.load(task + 8) * 2 + WG
    tl.debug_barrier()
    last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == pieces - 1
    tl.debug_barrier()
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def finish(
    acc, workspace, y_desc, r_desc, bias, task, pieces, n_out, ybuf, rbar, residual_phase,
    WG: gl.constexpr, TILE_M: gl.constexpr, PARTS: gl.constexpr, CUT: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Bias, residual, activation and store of a strip: of ``acc``, or if CUT of all the pieces; the next phase.

    Goes by chunks of 64 tokens through a ring of output tiles; a residual is fetched into all of them beforehand.
    """
    DTYPE: gl.constexpr = ybuf.dtype
    CHUNKS: gl.constexpr = TILE_M // 64
    SLOTS: gl.constexpr = ybuf.shape[0] // (2 * PARTS)
    ROWS: gl.constexpr = 64 // PARTS
    CHUNK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    Y_PARTS: gl.constexpr = gl.NVMMASharedLayout(128 // PARTS, DTYPE.primitive_bitwidth, rank=3)
    PART_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4 * PARTS, 8 // PARTS], [1, 4, 1], [2, 1, 0])
    token = gl.load(task)
    features = task + 3 + WG * PARTS
    if HAS_BIAS:
        rows = gl.arange(0, 64, gl.SliceLayout(1, CHUNK))
        out = gl.load(features + rows // ROWS) + rows % ROWS
    if HAS_RESIDUAL:
        tma.store_wait(0)  # the task before has left the output tiles
        mbarrier.expect(rbar.index(WG), 64 * TILE_M * DTYPE.primitive_bitwidth // 8)
        for i in gl.static_range(CHUNKS * PARTS):
            slot = ybuf.index(WG * CHUNKS * PARTS + i)
            corner = [token + i // PARTS * 64, gl.load(features + i % PARTS)]
            tma.async_copy_global_to_shared(r_desc, corner, rbar.index(WG), slot)
        mbarrier.wait(rbar.index(WG), residual_phase)
        residual_phase ^= 1
    for c in gl.static_range(CHUNKS):
        if CUT:
            v = _chunk_of_pieces(workspace, gl.load(task + 8), pieces, WG, c, TILE_M, CHUNK)
        else:
            v = _chunk_of(acc, c, TILE_M, CHUNK)
        tile = (WG * SLOTS + c % SLOTS) * PARTS
        out_tile = ybuf.index(tile)._reinterpret(DTYPE, [PARTS, 64, ROWS], Y_PARTS)
        if HAS_BIAS:
            v += gl.load(bias + out, mask=out < n_out, other=0.0).to(gl.float32)[:, None]
        if HAS_RESIDUAL:
            r = gl.reshape(gl.permute(out_tile.load(PART_LAYOUT), (0, 2, 1)), (64, 64))
            v += gl.convert_layout(r, CHUNK).to(gl.float32)
        else:
            tma.store_wait((SLOTS - 1) * PARTS)  # the chunk that was here before has left
        v = activate(v, ACTIVATION).to(DTYPE)
        out_tile.store(gl.permute(gl.reshape(v, (PARTS, ROWS, 64)), (0, 2, 1)))
        fence_async_shared()
        for i in gl.static_range(PARTS):
            tma.async_copy_shared_to_global(y_desc, [token + c * 64, gl.load(features + i)], ybuf.index(tile + i))
    return residual_phase
