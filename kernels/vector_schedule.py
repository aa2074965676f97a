"""The offline schedule of the one-token linear kernel: block rows, the long ones cut into parts along the inputs.

One program walks a row in steps that each wait for memory twice (which input, then the input), so the longest row
decides where rows differ. Cutting costs a rendezvous of 1 to 1.5 us: it pays where a row is far longer than the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.configs import LinearConfig, LinearProblem, next_power_of_two
from tetris.kernels.splitting import cut
from tetris.layout import ceil_div

MOST_PARTS = 32
"""Of a row: their sums are loaded at once."""
RESIDENT_WARPS = 32
"""Of a multiprocessor, with the registers that this kernel takes; more programs would run in a second wave."""
EVEN = 1.75
"""Rows are not cut where the longest keeps less than this times the mean."""
WORTH_CUTTING = 4
"""Nor where it takes no more steps than this."""
LEAST_INPUTS = 512
"""Of a part: fewer are hardly worth the rendezvous."""


@dataclass(frozen=True, eq=False)
class VectorSchedule:
    """The parts of a layout's block rows; int32 tensors on one device.

    Attributes:
        parts: [n_parts, 8]: output tile (slice of a block row), first kept block, number of blocks, parts of its row,
            place of the row's first part and of this part among the parts of cut rows, two zeros. Longest first.
        counters: [parts of cut rows, at least 1], zeros: parts of a tile that are done. A launch counts them up and
            back to zero: two launches with the same schedule must not run at the same time.
        longest_part: blocks of it. most_parts: of a row.
    """

    parts: torch.Tensor
    counters: torch.Tensor
    longest_part: int
    most_parts: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes."""
        return [self.parts, self.counters]


def supports(problem: LinearProblem) -> str | None:
    """Why the kernel cannot run this problem; None = it can."""
    return None if problem.tokens <= 1 else f"takes one token; got {problem.tokens}"


def vector_tile(config: LinearConfig, block_out: int) -> int:
    """Output features of a program."""
    return next_power_of_two(min(config.tile_out or block_out, block_out))


def step_inputs(config: LinearConfig, block_in: int) -> int:
    """Inputs of a step."""
    return config.tile_k or next_power_of_two(block_in)


def programs_at_once(config: LinearConfig, sm_count: int) -> int:
    """Programs that the multiprocessors hold at the same time."""
    return sm_count * RESIDENT_WARPS // config.num_warps


def parts_of_rows(counts: list[int], slices: int, step_blocks: int, least_blocks: int, programs: int) -> list[int]:
    """Into how many parts every row is cut.

    Args:
        counts: blocks of every row; slices: tiles of a row, each cut alike.
        step_blocks: that a program multiplies at once; least_blocks: of a part.
        programs: that run at the same time: parts are as short as they can be without there being more of them.
    """
    longest, mean = max(counts), sum(counts) / len(counts)
    if longest <= max(EVEN * mean, WORTH_CUTTING * step_blocks):
        return [1] * len(counts)
    limit = least_blocks
    while True:
        parts = [min(MOST_PARTS, ceil_div(count, limit)) for count in counts]
        if sum(parts) * slices <= max(programs, len(counts) * slices) or limit >= longest:
            return parts
        limit += step_blocks


def make_vector_schedule(
    indptr: torch.Tensor, block: tuple[int, int], config: LinearConfig, sm_count: int
) -> VectorSchedule:
    """The schedule of one layer for a config; pure; about a millisecond of host time.

    Args:
        indptr: the layout's CSR row pointers (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN).
        sm_count: multiprocessors.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    pointers = indptr.cpu().numpy()
    counts = np.diff(pointers).tolist()
    slices = ceil_div(block[0], vector_tile(config, block[0]))
    step_blocks = max(1, step_inputs(config, block[1]) // block[1])
    least_blocks = max(step_blocks, LEAST_INPUTS // block[1])
    n_parts = parts_of_rows(counts, slices, step_blocks, least_blocks, programs_at_once(config, sm_count))
    records, place = [], 0
    for row, parts in enumerate(n_parts):
        for piece in range(slices):
            for part, (begin, end) in enumerate(cut(counts[row], parts)):
                first = int(pointers[row]) + begin
                records.append([row * slices + piece, first, end - begin, parts, place, place + part, 0, 0])
            place += parts if parts > 1 else 0
    records.sort(key=lambda record: -record[2])
    return VectorSchedule(
        parts=torch.tensor(records, dtype=torch.int32, device=indptr.device),
        counters=torch.zeros(max(1, place), dtype=torch.int32, device=indptr.device),
        longest_part=records[0][2],
        most_parts=max(n_parts),
    )
