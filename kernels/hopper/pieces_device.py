"""Tiles that several programs sum, each over a part of the inputs: leave the sums, then add them up (Gluon).

Every warpgroup leaves its sums of a piece in the workspace, fp32 [pieces, 2 warpgroups, accumulators, 64, N], and
counts itself; the one that comes last adds all pieces in the order of the inputs, whoever it is: the result does not
depend on timing. The counter is zero again afterwards.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _places(N: gl.constexpr, LAYOUT: gl.constexpr):
    """Where [64, N] sums lie: 8 x 8 of them side by side, which one instruction of a warp stores or loads."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))[None, :]
    return ((rows // 8) * (N // 8) + columns // 8) * 64 + rows % 8 * 8 + columns % 8


@gluon.jit
def leave_sums(
    accs, workspace, counters, record, pieces, WARPGROUP: gl.constexpr, R: gl.constexpr, MOST_R: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """Store a piece's accumulators; whether this is the last of its tile's pieces.

    ``record``: of the piece in the schedule's work; see ``schedule.Schedule.records``.
    """
    LAYOUT: gl.constexpr = accs[0].type.layout
    first = workspace + ((gl.load(record + 6) + gl.load(record + 7)) * 2 + WARPGROUP) * (MOST_R * 64 * N)
    for r in gl.static_range(R):
        gl.store(first + r * 64 * N + _places(N, LAYOUT), accs[r])
    counter = counters + gl.load(record + 5) * 2 + WARPGROUP
    tl.debug_barrier()
    is_last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == pieces - 1
    tl.debug_barrier()
    if is_last:
        gl.store(counter, 0)
    return is_last


@gluon.jit
def added_sums(
    workspace, record, pieces, WARPGROUP: gl.constexpr, R: gl.constexpr, MOST_R: gl.constexpr, N: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The R accumulators of a whole tile: all its pieces, added in their order."""
    first = workspace + (gl.load(record + 6) * 2 + WARPGROUP) * (MOST_R * 64 * N)
    accs = ()
    for r in gl.static_range(R):
        sums = gl.zeros((64, N), gl.float32, LAYOUT)
        for piece in range(pieces):
            sums += gl.load(first + (piece * 2 * MOST_R + r) * 64 * N + _places(N, LAYOUT), cache_modifier=".cg")
        accs = accs + (sums,)  # noqa: RUF005 -- the compiler's Python has no starred tuples
    return accs
