"""A kernel that only has roles: no ring, no barrier, no shared memory of its own. The control for racecheck.

compute-sanitizer's racecheck reports one hazard in every warp-specialised kernel: a worker warp reads the byte that
tells it its role, which Triton itself writes. What it reports here, where nothing else can race, is Triton's.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def leader(y):
    """Warps 0 to 3 write the first half of the program's outputs."""
    lanes = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y + gl.program_id(0) * 256 + lanes, lanes)


@gluon.jit
def worker(y):
    """Four more warps write the second half."""
    lanes = 128 + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y + gl.program_id(0) * 256 + lanes, lanes)


@gluon.jit
def idler(y):
    """A role of one warp, so that the warps of all roles do not fill warp groups, as in the Hopper kernels."""


@gluon.jit
def roles_kernel(y):
    """y: int32 [programs, 256], becomes 0 to 255 in every row. Grid: one program a row; num_warps=4."""
    gl.warp_specialize([(leader, (y,)), (worker, (y,)), (idler, (y,)), (idler, (y,))], [4, 1, 1], [32, 32, 32])


def roles_error(programs: int) -> float:
    """How many outputs are wrong."""
    y = torch.full((programs, 256), -1, dtype=torch.int32, device="cuda")
    roles_kernel[(programs,)](y, num_warps=4)
    return float((y != torch.arange(256, device="cuda")).sum())
