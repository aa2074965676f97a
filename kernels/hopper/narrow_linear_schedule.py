"""The offline schedule of the Hopper linear layer for narrow blocks: groups of strips, their stages, and who does what.

1. *strips*: block rows, or 64 or 128 outputs of taller ones; 256 neighbouring outputs form a *group*;
2. the *stages* of a group: per 64 inputs that any of its strips keeps, the kept weight tiles;
3. the *tasks*, one per (128 tokens, group), dealt to the programs in the order of the tokens (see ``schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.hopper.linear_schedule import BYTES_PER_CLOCK, STAGE_K
from tetris.kernels.hopper.schedule import Schedule, make_schedule
from tetris.layout import ceil_div

TILE_TOKENS = 128
TILE_OUT = 256
LINE = 64
"""Weights that are fetched side by side: 128 bytes."""
ITEM_SIZE = 2

BRANCH_CLOCKS = 5
"""For every weight tile that a stage could hold. With the bytes below: 3 % from both times measured on an H200 (8192 x
4096 -> 4096, 27 % kept at random: 32 x 32 blocks 247 us, 128 x 16 blocks 209 us)."""
FIXED_CLOCKS = 2000
"""A task's prologue and epilogue."""


def strip_outputs(block_out: int) -> int:
    """Outputs of a strip."""
    return next(n for n in (128, 64, 32) if block_out % n == 0)


def stage_slots(block: tuple[int, int]) -> int:
    """Weight tiles in a stage when all are kept."""
    return TILE_OUT // strip_outputs(block[0]) * (STAGE_K // block[1])


@dataclass(frozen=True, eq=False)
class NarrowSchedule:
    """What the device code walks through; all int32 tensors on one device.

    Attributes:
        groups: [n_groups, 2]: first entry and number of stages.
        entries: [n_stages + 1, 3 + slots]: per stage its first input feature; the number of kept weight tiles; their
            mask (bit = slot = ``input tile of the stage * strips of a group + strip``); for each of them
            ``slots * first row in values.view(-1, 64) + slot``. The last is empty.
        tasks: token tile * n_groups + group, dealt to the programs.
        clocks: estimate for the tasks of one token tile together.
    """

    groups: torch.Tensor
    entries: torch.Tensor
    tasks: Schedule
    clocks: float

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes: groups, entries, program_ptr, order."""
        return [self.groups, self.entries, self.tasks.program_ptr, self.tasks.order]


def _tiles(indptr: np.ndarray, indices: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """[n_tiles, 3] int64: strip, input tile and first row in ``values.view(-1, 64)`` of every kept weight tile."""
    outputs = strip_outputs(block[0])
    parts, lines = block[0] // outputs, outputs * block[1] // LINE
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    blocks = np.stack([row * parts, indices, np.arange(len(indices)) * parts * lines], axis=1)
    return (blocks[:, None] + np.arange(parts)[None, :, None] * np.array([1, 0, lines])).reshape(-1, 3)


def make_narrow_schedule(
    indptr: torch.Tensor, indices: torch.Tensor, *, block: tuple[int, int], tokens: int, n_programs: int
) -> NarrowSchedule:
    """The schedule of one layer for one number of tokens; pure; about 20 ms of host time.

    Args:
        indptr, indices: the layout's CSR (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN): a multiple of 32 outputs, 16, 32 or 64 inputs; at least 1024 weights.
        tokens: rows of x.
        n_programs: persistent programs, the GPU's multiprocessors.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    outputs, slots, per_stage = strip_outputs(block[0]), stage_slots(block), STAGE_K // block[1]
    strips = TILE_OUT // outputs
    tiles = _tiles(indptr.cpu().numpy(), indices.cpu().numpy().astype(np.int64), block)
    group, stage = tiles[:, 0] // strips, tiles[:, 1] // per_stage
    slot = tiles[:, 1] % per_stage * strips + tiles[:, 0] % strips
    order = np.lexsort((slot, stage, group))
    _, starts, counts = np.unique(np.stack([group, stage])[:, order], axis=1, return_index=True, return_counts=True)
    entries = np.zeros((len(starts) + 1, 3 + slots), np.int64)
    entries[:-1, 0], entries[:-1, 1] = stage[order][starts] * STAGE_K, counts
    which = np.repeat(np.arange(len(starts)), counts)
    np.add.at(entries[:, 2], which, 1 << slot[order])
    entries[which, 3 + np.arange(len(order)) - starts[which]] = (tiles[:, 2] * slots + slot)[order]
    ends = np.bincount(group[order][starts]).cumsum()
    stages = np.diff(ends, prepend=0)
    weights = np.bincount(group) * outputs * block[1]
    size = ITEM_SIZE * (stages * TILE_TOKENS * STAGE_K + weights)
    clocks = size / BYTES_PER_CLOCK + stages * slots * BRANCH_CLOCKS
    tasks = make_schedule(clocks.tolist(), ceil_div(tokens, TILE_TOKENS), n_programs, tile_cost=FIXED_CLOCKS)
    device = indptr.device
    return NarrowSchedule(
        torch.tensor(np.stack([ends - stages, stages], axis=1), dtype=torch.int32, device=device),
        torch.tensor(entries, dtype=torch.int32, device=device),
        tasks.to(device),
        float(clocks.sum()),
    )
