"""The offline schedule of the Hopper linear layer for narrow blocks: groups of strips, their stages, and who does what.

1. *strips*: block rows, or 64 or 128 outputs of taller ones; up to 256 or 384 neighbouring outputs form a *group*, as
   many groups as give the programs even work;
2. the *stages* of a group: per 64 inputs that any of its strips keeps, the kept weight tiles;
3. the *tasks*, one per (128 tokens, group), dealt to the programs in the order of the tokens (see ``schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.hopper.linear_schedule import STAGE_K
from tetris.kernels.hopper.schedule import Schedule, make_schedule
from tetris.layout import ceil_div

TILE_TOKENS = 128
TILE_OUT = (256, 384)
"""Outputs of a group at most: what the registers of two warp groups hold, with room to spare or just."""
OUT_STEP = 64
"""Outputs that are stored together."""
FEW_BRANCHES = 2048
"""Weights of a tile from which each warp group takes half of the tokens for all strips, a branch for every tile of a
stage that there could be, 12 at most (H200, 27 % kept at random, 384 outputs, so and with half of the strips: 128 x 16
177 and 206 us, 32 x 64 204 and 216, 64 x 32 182 and 189; but 32 x 32, with 24 branches, 245 and 212)."""
MASK_BITS = 24
"""Of a stage's mask, one for each weight tile that there could be."""
LINE = 64
"""Weights that are fetched side by side: 128 bytes."""
ITEM_SIZE = 2

SHARED_BYTES, BARRIER_BYTES = 232448, 512
RING_BYTES = SHARED_BYTES - BARRIER_BYTES - 4 * 64 * 64 * ITEM_SIZE
"""Beside the output tiles: two of 64 x 64 for each of two warp groups."""
SHALLOW = {6: 0.9, 5: 0.895, 4: 0.94, 3: 1.05}
"""Stages of the ring, and what it costs to have no more (H200, 256 outputs, 32 x 32: 229, 228, 240, 279 us)."""
STAGE_CLOCKS, BRANCH_CLOCKS, PRODUCT_CLOCKS = {1: 311, 2: 402}, 19.6, 1.8
"""A warp group's chain: a stage, by the halves of the tokens; every tile that it could hold; every clock of products.
Fitted to 16 layers on an H200 (8192 x 4096 -> 4096 at random, seven blocks and fractions, 256 and 384 outputs): 4 % off
on average, 10 % at most. 384 outputs were faster in all but one (32 x 32, 10 % kept), by 3 to 7 %."""
FIXED_CLOCKS = 2000
"""A task's prologue and epilogue."""
MORE_GROUPS = 4
"""Than need be, at most, for even work."""


def token_halves(block: tuple[int, int]) -> int:
    """Halves of a task's tokens that each of two warp groups multiplies: 1, for all strips, or 2, for half of them."""
    outputs = next(n for n in (128, 64, 32) if block[0] % n == 0)
    return 1 if outputs * block[1] >= FEW_BRANCHES else 2


def strip_outputs(block: tuple[int, int], tile_out: int = TILE_OUT[0]) -> int:
    """Outputs of a strip: a block row's or an equal part of it; a warp group takes whole strips."""
    share = tile_out // token_halves(block)
    return next(n for n in (128, 64, 32) if block[0] % n == 0 and share % n == 0)


@dataclass(frozen=True)
class Ring:
    """Shared memory's stages.

    Attributes:
        stages: of the ring; places: for weight tiles in one, all that a stage may keep or fewer.
        tiles: weight tiles that a stage could keep; tile_bytes: of one of them.
    """

    stages: int
    places: int
    tiles: int
    tile_bytes: int


def rings(block: tuple[int, int], tile_out: int) -> list[Ring]:
    """The deepest ring first. Few places make it deep; a stage that keeps more tiles than that is cut in two."""
    outputs = strip_outputs(block, tile_out)
    tiles, tile_bytes = tile_out // outputs * (STAGE_K // block[1]), outputs * block[1] * ITEM_SIZE
    found: list[Ring] = []
    for stages in SHALLOW:
        places = min(tiles, (RING_BYTES // stages - TILE_TOKENS * STAGE_K * ITEM_SIZE) // tile_bytes)
        if places > (found[-1].places if found else 0):
            found.append(Ring(stages, places, tiles, tile_bytes))
    return found


def ring_stages(places: int, tile_bytes: int) -> int:
    """Stages of the ring with that many places in each."""
    return min(max(SHALLOW), RING_BYTES // (TILE_TOKENS * STAGE_K * ITEM_SIZE + places * tile_bytes))


@dataclass(frozen=True, eq=False)
class NarrowSchedule:
    """What the device code walks through; all int32 tensors on one device.

    Attributes:
        groups: [n_groups, 5]: first entry, number of stages, first output of the group and of its second warp group's
            share, and one past its last.
        entries: [n_stages + 1, 3 + places]: per stage its first input feature; the number of kept weight tiles; their
            mask (bit = ``(warp group * input tiles of a stage + input tile) * strips of a warp group + strip``; from
            bit 24 on the number of the first warp group's; where warp groups share the strips, all are the first's);
            the first row in ``values.view(-1, 64)`` of each, in the order of the bits. The last is empty.
        tasks: token tile * n_groups + group, dealt to the programs.
        clocks: estimate of when the busiest program ends.
    """

    groups: torch.Tensor
    entries: torch.Tensor
    tasks: Schedule
    clocks: float

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes: groups, entries, program_ptr, order."""
        return [self.groups, self.entries, self.tasks.program_ptr, self.tasks.order]


def _tiles(indptr: np.ndarray, indices: np.ndarray, block: tuple[int, int], outputs: int) -> np.ndarray:
    """[n_tiles, 3] int64: strip, input tile and first row in ``values.view(-1, 64)`` of every kept weight tile."""
    parts, lines = block[0] // outputs, outputs * block[1] // LINE
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    blocks = np.stack([row * parts, indices, np.arange(len(indices)) * parts * lines], axis=1)
    return (blocks[:, None] + np.arange(parts)[None, :, None] * np.array([1, 0, lines])).reshape(-1, 3)


def _rank(group: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """How many before each belong to the same group and stage, which are sorted."""
    new = np.r_[True, (np.diff(group) != 0) | (np.diff(stage) != 0)]
    return np.arange(len(new)) - np.flatnonzero(new)[new.cumsum() - 1]


def _shares(n_steps: int, n_groups: int) -> np.ndarray:
    """[n_groups, 3]: first step of every group and of its second warp group, one past its last; as even as can be."""
    bounds = np.arange(n_groups + 1) * n_steps // n_groups
    return np.stack([bounds[:-1], (bounds[:-1] + bounds[1:] + 1) // 2, bounds[1:]], axis=1)


@dataclass(frozen=True)
class _Groups:
    """One way to group the strips: shares in strips, the group of every kept tile, stages and clocks of each group."""

    shares: np.ndarray
    group: np.ndarray
    ring: Ring
    stages: np.ndarray
    clocks: np.ndarray


def _grouped(tiles: np.ndarray, shares: np.ndarray, block: tuple[int, int], ring: Ring) -> _Groups:
    group = np.searchsorted(shares[:, 0], tiles[:, 0], side="right") - 1
    stage = tiles[:, 1] * block[1] // STAGE_K
    kept = np.zeros((len(shares), int(stage.max()) + 1), np.int64)
    np.add.at(kept, (group, stage), 1)
    stages = -(-kept // ring.places).sum(1)
    halves = token_halves(block)
    products = kept.sum(1) * ring.tile_bytes / 64  # [64, N] by [N, TILE_K] takes N x TILE_K / 32 clocks
    chain = stages * (STAGE_CLOCKS[halves] + ring.tiles / halves * BRANCH_CLOCKS) + products * PRODUCT_CLOCKS
    clocks = chain * SHALLOW[ring.stages]
    return _Groups(shares, group, ring, stages, clocks)


def _end(way: _Groups, tasks: Schedule, token_tiles: int) -> float:
    """When the busiest program ends, in clocks."""
    return tasks.makespan * token_tiles * float((way.clocks + FIXED_CLOCKS).sum()) / tasks.programs


def make_narrow_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    block: tuple[int, int],
    tokens: int,
    n_programs: int,
    tile_out: int = TILE_OUT[0],
) -> NarrowSchedule:
    """The schedule of one layer for one number of tokens; pure; about 20 ms of host time.

    Args:
        indptr, indices: the layout's CSR (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN): a multiple of 32 outputs, 16, 32 or 64 inputs; at least 1024 weights.
        tokens: rows of x.
        n_programs: persistent programs, the GPU's multiprocessors.
        tile_out: outputs of a group at most, one of TILE_OUT.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    outputs, per_stage = strip_outputs(block, tile_out), STAGE_K // block[1]
    tiles = _tiles(indptr.cpu().numpy(), indices.cpu().numpy().astype(np.int64), block, outputs)
    step = max(1, OUT_STEP // outputs)
    n_steps, token_tiles = ceil_div((len(indptr) - 1) * block[0], step * outputs), ceil_div(tokens, TILE_TOKENS)
    least = ceil_div(n_steps * step * outputs, tile_out)
    ways = [
        _grouped(tiles, step * _shares(n_steps, n_groups), block, ring)
        for n_groups in range(least, min(n_steps, least + MORE_GROUPS) + 1)
        for ring in rings(block, tile_out)
    ]

    def dealt(way: _Groups, swaps: bool) -> Schedule:
        costs = way.clocks.tolist()
        return make_schedule(costs, token_tiles, n_programs, tile_cost=FIXED_CLOCKS, swaps=swaps)

    made = min(ways, key=lambda way: _end(way, dealt(way, swaps=False), token_tiles))
    tasks = dealt(made, swaps=True)
    begin, middle, _ = made.shares[made.group].T
    shares = token_halves(block)
    second = (tiles[:, 0] >= middle) & (shares == 2)
    place = tiles[:, 0] - np.where(second, middle, begin)
    stage = tiles[:, 1] // per_stage
    bit = (second * per_stage + tiles[:, 1] % per_stage) * (made.ring.tiles // shares // per_stage) + place
    order = np.lexsort((bit, stage, made.group))
    heads = np.stack([made.group, stage, _rank(made.group[order], stage[order])[order.argsort()] // made.ring.places])
    _, starts, counts = np.unique(heads[:, order], axis=1, return_index=True, return_counts=True)
    entries = np.zeros((len(starts) + 1, 3 + made.ring.places), np.int64)
    entries[:-1, 0], entries[:-1, 1] = stage[order][starts] * STAGE_K, counts
    which = np.repeat(np.arange(len(starts)), counts)
    np.add.at(entries[:, 2], which, 1 << bit[order])
    np.add.at(entries[:, 2], which[~second[order]], 1 << MASK_BITS)
    entries[which, 3 + np.arange(len(order)) - starts[which]] = tiles[order, 2]
    ends = made.stages.cumsum()
    groups = np.concatenate([np.stack([ends - made.stages, made.stages], axis=1), made.shares * outputs], axis=1)
    device = indptr.device
    return NarrowSchedule(
        torch.tensor(groups, dtype=torch.int32, device=device),
        torch.tensor(entries, dtype=torch.int32, device=device),
        tasks.to(device),
        _end(made, tasks, token_tiles),
    )
