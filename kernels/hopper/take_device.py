"""Tiles taken when they are needed (Gluon): a counter in memory says which is next, and the producer tells the others.

See ``schedule.one_list`` for where that pays. The producer asks for a tile when it begins to load the one before.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tetris.kernels.hopper.geometry import NOTICES

RING: gl.constexpr = gl.constexpr(NOTICES)


@gluon.jit
def ask(counter, WARPS: gl.constexpr):
    """Count up; what was there before comes back in the first lane, and is waited for when it is looked at."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lanes = gl.arange(0, 32 * WARPS, LAYOUT)
    one = gl.full([32 * WARPS], 1, gl.int32, LAYOUT)
    return gl.atomic_add(counter + lanes * 0, one, mask=lanes == 0, sem="relaxed")


@gluon.jit
def answer(counter, asked, last, WARPS: gl.constexpr):
    """The position that :func:`ask` was about, after ``last`` where none is left.

    The first tile of every program is its number's. Programs ask once a tile: the one that asks last, of all tiles'
    number, clears the counter for the next launch.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    count = gl.max(gl.where(gl.arange(0, 32 * WARPS, LAYOUT) == 0, asked, 0), 0)
    if count == last:
        gl.store(counter, 0)
    return gl.num_programs(0) + count


@gluon.jit
def tell(notices, told, heard, number, position, WARPS: gl.constexpr):
    """Tell the consumers the position of the tile ``number``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = number % RING
    mbarrier.wait(heard.index(slot), ((number // RING) & 1) ^ 1)
    notices.index(slot).store(gl.full([1], position, gl.int32, LAYOUT))
    mbarrier.arrive(told.index(slot))


@gluon.jit
def hear(notices, told, number):
    """The position of the tile ``number``; arrive at ``heard`` when done with it."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = number % RING
    mbarrier.wait(told.index(slot), (number // RING) & 1)
    return gl.max(notices.index(slot).load(LAYOUT), 0)
