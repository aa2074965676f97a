"""The offline schedule of the split linear kernel: one packed record for every part of a block row.

A program finds all it needs in its record, whose address it knows: nothing but the tiles themselves depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem, is_power_of_two_tile
from tetris.kernels.splitting import PartCosts, choose_parts, cut
from tetris.layout import ceil_div

HEAD_FIELDS = 8
BYTES_PER_CLOCK = 37
"""What the L2 cache delivers to one of an H200's multiprocessors while all of them fetch."""
MERGE_BYTES_PER_CLOCK = 64
"""The same while few of them fetch."""
FIXED_CLOCKS, SYNCHRONISE_CLOCKS = 2000, 1500
"""A part's first loads and epilogue; the fence, the counter and the first of the other parts' sums."""


@dataclass(frozen=True, eq=False)
class SplitSchedule:
    """The parts of a layer's block rows; int32 tensors on one device.

    Attributes:
        parts: [n_parts, 8 + most blocks of a part]: output tile (slice of a block row), first kept block, number of
            blocks, parts of its row, place of the row's first part and of this part among the parts of cut rows, two
            zeros; then the first input feature of every block. Longest first.
        counters: [token tiles, parts of cut rows], zeros: parts of a tile that are done. A launch counts them up and
            back to zero: two launches with the same schedule must not run at the same time.
    """

    parts: torch.Tensor
    counters: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes."""
        return [self.parts, self.counters]


def supports(problem: LinearProblem, device: DeviceInfo, config: LinearConfig) -> str | None:
    """Why the split kernel cannot run this problem with this config; None = it can."""
    if not device.has_descriptors:
        return f"needs tensor descriptors in hardware; {device.name} has none"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16; got {problem.dtype}"
    if problem.in_features % 8:
        return f"takes multiples of 8 inputs (16-byte rows); got {problem.in_features}"
    tiles = (config.tile_out, config.tile_k, config.tile_tokens)
    if not all(is_power_of_two_tile(size) for size in tiles):
        return f"takes tiles that are powers of two from 16; got {tiles}"
    if problem.block[0] % config.tile_out or problem.block[1] % config.tile_k:
        return f"takes tiles that divide the blocks; got {tiles[:2]} for {problem.block}"
    return None


def make_split_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    block: tuple[int, int],
    tokens: int,
    tile_tokens: int,
    tile_out: int,
    n_programs: int,
    item_size: int = 2,
) -> SplitSchedule:
    """The schedule of one layer for one number of tokens; pure; some milliseconds of host time.

    Args:
        indptr, indices: the layout's CSR (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN); tile_out: outputs of a program, BLOCK_OUT or a part of it.
        tokens: rows of x; tile_tokens: rows of a program.
        n_programs: that run at the same time.
        item_size: bytes of an element of x.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    block_out, block_in = block
    pointers = indptr.cpu().numpy()
    columns = indices.cpu().numpy() * block_in
    counts = np.diff(pointers)
    slices, tiles = ceil_div(block_out, tile_out), ceil_div(tokens, tile_tokens)
    clocks = (tile_tokens + tile_out) * block_in * item_size / BYTES_PER_CLOCK
    merge = tile_tokens * tile_out * 4 / MERGE_BYTES_PER_CLOCK
    n_parts = choose_parts(
        [clocks * float(count) for count in counts], counts.tolist(), slices * tiles, n_programs,
        PartCosts(FIXED_CLOCKS, SYNCHRONISE_CLOCKS, merge),
    )  # fmt: skip
    records = []
    place = 0
    for row, parts in enumerate(n_parts):
        for piece in range(slices):
            for part, (begin, end) in enumerate(cut(int(counts[row]), parts)):
                first = int(pointers[row]) + begin
                head = [row * slices + piece, first, end - begin, parts, place, place + part, 0, 0]
                records.append(head + columns[first : first + end - begin].tolist())
            place += parts if parts > 1 else 0
    records.sort(key=lambda record: -record[2])
    width = ceil_div(len(records[0]), HEAD_FIELDS) * HEAD_FIELDS
    table = [record + [0] * (width - len(record)) for record in records]
    return SplitSchedule(
        parts=torch.tensor(table, dtype=torch.int32, device=indptr.device),
        counters=torch.zeros((tiles, place), dtype=torch.int32, device=indptr.device),
    )
