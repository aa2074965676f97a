"""The offline schedule of the Hopper linear layer for narrow blocks: groups of strips, their stages, and who does what.

1. *strips*: block rows of 32 outputs, or 64 outputs of taller ones; neighbouring strips form *groups* of nearly equal
   size, as many groups as keep all programs busy to the end (see ``_split``);
2. the *stages* of a group: per 64 inputs that any of its strips keeps, the kept weight tiles in the order (input,
   strip); one with more tiles than a stage holds comes several times;
3. the *tasks*, one per (128 tokens, group), dealt to the programs in the order of the tokens (see ``schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.hopper.schedule import Schedule, make_schedule
from tetris.layout import ceil_div

TILE_TOKENS = 128
STAGE_K = 64
CHUNK = 64
"""Outputs that are stored together; a group is a multiple of it."""
WEIGHT_BYTES = 20480
"""Room for a stage's weights: at 27 % kept one stage in fifty needs more."""
GROUP_FIELDS = 4
ENTRY_FIELDS = 3

BYTES_PER_CLOCK = 50
"""What the L2 cache delivers to a multiprocessor of an H200 whose neighbours ask for the same input tiles."""
CLOCKS_PER_ROW = 2.1
"""The copy engine's, for each row of 128 bytes."""
FIXED_CLOCKS = 2000
"""A task's prologue and epilogue."""


def strip_outputs(block_out: int) -> int:
    """Outputs of a strip."""
    return min(block_out, CHUNK)


def stage_slots(block: tuple[int, int]) -> int:
    """Weight tiles that a stage holds; at least 3."""
    return max(3, WEIGHT_BYTES // (2 * strip_outputs(block[0]) * block[1]))


@dataclass(frozen=True, eq=False)
class NarrowSchedule:
    """What the device code walks through; all int32 tensors on one device.

    Attributes:
        groups: [n_groups, 4]: first entry, number of stages, first output feature, the feature after the last.
        entries: [n_stages + 1, 3 + slots]: per stage its first input feature; how many weight tiles it multiplies;
            their mask (bit ``input tile of the stage * strips of a group + strip``); the first row of each in
            ``values.view(-1, 64)``. The last is empty.
        tasks: token tile * n_groups + group, dealt to the programs.
    """

    groups: torch.Tensor
    entries: torch.Tensor
    tasks: Schedule

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes: groups, entries, program_ptr, order."""
        return [self.groups, self.entries, self.tasks.program_ptr, self.tasks.order]


def _tiles(indptr: np.ndarray, indices: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """[n_tiles, 3] int64: strip, input tile and first row in ``values.view(-1, 64)`` of every kept weight tile."""
    block_out, block_in = block
    parts = block_out // strip_outputs(block_out)
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    blocks = np.stack([row * parts, indices, np.arange(len(indices)) * (block_out * block_in // CHUNK)], axis=1)
    step = np.array([1, 0, strip_outputs(block_out) * block_in // CHUNK])
    return (blocks[:, None] + np.arange(parts)[None, :, None] * step).reshape(-1, 3)


def _entries(tiles: np.ndarray, first_strip: int, strips: int, per_stage: int, slots: int) -> list[list[int]]:
    """The stages of one group.

    Args:
        tiles: the group's, as from :func:`_tiles`.
        strips: of a full group, the stride of the mask's bits; per_stage: input tiles of a stage.
    """
    bits = tiles[:, 1] % per_stage * strips + tiles[:, 0] - first_strip
    stage = tiles[:, 1] // per_stage
    order = np.lexsort((bits, stage))
    entries = []
    starts = np.flatnonzero(np.diff(stage[order], prepend=-1))
    for start, end in zip(starts, np.append(starts[1:], len(order))):
        for begin in range(start, end, slots):
            chosen = order[begin : min(begin + slots, end)]
            mask = int(sum(1 << int(bit) for bit in bits[chosen]))
            rows = tiles[chosen, 2].tolist()
            entries.append([int(stage[order[start]]) * STAGE_K, len(rows), mask, *rows, *[0] * (slots - len(rows))])
    return entries


def _clocks(entries: list[list[int]], block: tuple[int, int]) -> float:
    """What the stages of a group take: the longest of fetching bytes, fetching rows and multiplying."""
    outputs = strip_outputs(block[0])
    kept = sum(entry[1] for entry in entries)
    rows = len(entries) * TILE_TOKENS + kept * outputs * block[1] // CHUNK
    multiply = kept * TILE_TOKENS * outputs * block[1] / 2048
    return max(128 * rows / BYTES_PER_CLOCK, CLOCKS_PER_ROW * rows, multiply)


def make_narrow_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    block: tuple[int, int],
    tokens: int,
    tile_out: int,
    n_programs: int,
) -> NarrowSchedule:
    """The schedule of one layer for one number of tokens; pure; tens of ms of host time.

    Args:
        indptr, indices: the layout's CSR (int32).
        block: (BLOCK_OUT, BLOCK_IN): 32 or a multiple of 64 outputs, 16, 32 or 64 inputs.
        tokens: rows of x.
        tile_out: outputs of the largest group, a multiple of 64.
        n_programs: persistent programs, the GPU's multiprocessors.
    Returns:
        The schedule that is estimated to end first among a few numbers of groups, on the device of ``indptr``.
    """
    ptr, idx = indptr.cpu().numpy(), indices.cpu().numpy()
    tiles = _tiles(ptr, idx.astype(np.int64), block)
    chunks = ceil_div((len(ptr) - 1) * block[0], CHUNK)
    least = ceil_div(chunks, tile_out // CHUNK)
    plans = [
        _plan(tiles, chunks, n, block, tokens, tile_out, n_programs) for n in range(least, min(least + 3, chunks) + 1)
    ]
    _, groups, entries, tasks = min(plans, key=lambda plan: plan[0])
    entries.append([0] * len(entries[0]))
    device = indptr.device
    return NarrowSchedule(
        torch.tensor(groups, dtype=torch.int32, device=device),
        torch.tensor(entries, dtype=torch.int32, device=device),
        tasks.to(device),
    )


def _plan(
    tiles: np.ndarray, chunks: int, n_groups: int, block: tuple[int, int], tokens: int, tile_out: int, n_programs: int
) -> tuple[float, list[list[int]], list[list[int]], Schedule]:
    """(estimated end, groups, entries, tasks) with ``n_groups`` groups of nearly as many outputs."""
    outputs, per_stage = strip_outputs(block[0]), STAGE_K // block[1]
    groups: list[list[int]] = []
    entries: list[list[int]] = []
    clocks = []
    for g in range(n_groups):
        first, end = (CHUNK * (i * chunks // n_groups) for i in (g, g + 1))
        strips = tiles[:, 0] * outputs
        own = tiles[(strips >= first) & (strips < end)]
        stages = _entries(own, first // outputs, tile_out // outputs, per_stage, stage_slots(block))
        groups.append([len(entries), len(stages), first, end])
        entries += stages
        clocks.append(_clocks(stages, block))
    token_tiles = ceil_div(tokens, TILE_TOKENS)
    tasks = make_schedule(clocks, token_tiles, n_programs, tile_cost=FIXED_CLOCKS)
    total = token_tiles * (sum(clocks) + n_groups * FIXED_CLOCKS)
    return tasks.makespan * total / tasks.programs, groups, entries, tasks
