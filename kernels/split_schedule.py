"""The offline schedule of the split linear kernel: one packed record for every part of a block row.

A program finds all it needs in its record, whose address it knows: nothing but the tiles themselves depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem, is_power_of_two_tile
from tetris.kernels.splitting import PartCosts, choose_parts, cut, makespan
from tetris.layout import ceil_div

HEAD_FIELDS = 8
PAST = 1 << 30
"""A first feature past the end of any matrix: TMA reads zeros there."""
MERGED_BYTES = 98304
"""Of the other parts' sums that the last part of a row has on their way: four tiles of 16 kB, three of 32 kB."""
BYTES_PER_CLOCK = 37
"""What the L2 cache delivers to one of an H200's multiprocessors while all of them fetch."""
MERGE_BYTES_PER_CLOCK = 64
"""The same while few of them fetch."""
FIXED_CLOCKS, SYNCHRONISE_CLOCKS = 2000, 1500
"""A part's first loads and epilogue; the fence, the counter and the first of the other parts' sums."""
SHARED_BYTES = 227 << 10
"""Of an H200's multiprocessor, for all its programs."""
STAGES, SHARING_STAGES = 10, 7
"""Of the pipeline, and where there are many programs of whole rows: two of the largest tiles then share a
multiprocessor (H200, 512 tokens, 1024 -> 4096 reordered: 11.6 us; tiles of 64 12.9). Cut rows want ten (128 tokens,
4096 -> 14336 reordered: 20.3 against 21.3)."""
TURNS = (1, 2, 3)
"""Programs of a multiprocessor for which rows are cut; the cut that is estimated to end first is taken."""


@dataclass(frozen=True)
class Clocks:
    """What a launch takes, in clocks of an H200's multiprocessor, fitted to 62 layers (bench/NOTES.md, "few tokens").

    Attributes:
        launch: an empty kernel and the store of the output.
        prologue: of a part: its record, the first tile from a cold L2.
        step: of a program for one block: barriers and instructions, whatever the size of the tiles.
        arrive: fence and counter of a part of a cut row.
        merge_rate: bytes a clock at which the last part of a row reads the others' sums.
        rate: bytes of tiles a clock that a multiprocessor takes in; task: of every part beside that.
        cut: where any row is cut; mix_rate: bytes a clock and multiprocessor of all cut parts' sums.
    """

    launch: float = 5108.0
    prologue: float = 5038.0
    step: float = 517.0
    arrive: float = 1764.0
    merge_rate: float = 33.7
    rate: float = 50.8
    task: float = 846.0
    cut: float = 3212.0
    mix_rate: float = 9.6

    def of_launch(
        self,
        counts: Sequence[int],
        parts: Sequence[int],
        copies: int,
        tile_bytes: int,
        sums_bytes: int,
        sm_count: int,
        resident: int,
    ) -> float:
        """The estimate for a layout.

        Args:
            counts: blocks of every row; parts: into how many it is cut; copies: tiles that every row has.
            tile_bytes: of a block's weights and inputs; sums_bytes: of a part's sums.
            sm_count: multiprocessors; resident: programs that one holds at the same time.
        """
        alone: list[float] = []
        taken: list[float] = []
        for count, n in zip(counts, parts):
            size = ceil_div(count, n)
            part = self.prologue + size * self.step + (self.arrive if n > 1 else 0.0)
            merge = n * sums_bytes / self.merge_rate if n > 1 else 0.0
            alone += [part] * ((n - 1) * copies) + [part + merge] * copies
            taken += [size * tile_bytes / self.rate + self.task] * (n * copies)
        sums = sum(n for n in parts if n > 1) * copies * sums_bytes
        mixing = self.cut + sums / sm_count / self.mix_rate if sums else 0.0
        fetching = self.prologue + makespan(taken, sm_count) + mixing
        return self.launch + max(makespan(alone, sm_count * resident), fetching)


def shares_processors(parts: Sequence[int], copies: int, sm_count: int) -> bool:
    """Whether there are so many programs of whole rows that a multiprocessor should hold several at a time."""
    return max(parts) == 1 and len(parts) * copies > 1.5 * sm_count


def resident_programs(tile_tokens: int, tile_out: int, stages: int) -> int:
    """Programs that a multiprocessor holds at the same time, by their shared memory: two stages make one buffer."""
    return max(1, SHARED_BYTES // (stages // 2 * (tile_tokens + tile_out) * 128 + 1024))


@dataclass(frozen=True, eq=False)
class SplitSchedule:
    """The parts of a layer's block rows; int32 tensors on one device.

    Attributes:
        parts: [n_parts, 8 + most blocks of a part]: output tile (slice of a block row), first kept block, number of
            blocks, parts of its row, place of the row's first part and of this part among the parts of cut rows, two
            zeros; then the first input feature of every block, and PAST. Longest first.
        counters: [token tiles, parts of cut rows], zeros: parts of a tile that are done. A launch counts them up and
            back to zero: two launches with the same schedule must not run at the same time.
        clocks: estimate of a launch. stages: of its pipeline.
    """

    parts: torch.Tensor
    counters: torch.Tensor
    clocks: float
    stages: int

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
    if problem.block[0] % config.tile_out or problem.block[1] % config.tile_k * (config.tile_k % problem.block[1]):
        return f"takes tiles that divide the blocks, or whole blocks a step; got {tiles[:2]} for {problem.block}"
    if config.tile_k > HEAD_FIELDS * problem.block[1]:
        return f"takes {HEAD_FIELDS} blocks a step at most; got {config.tile_k} inputs of {problem.block[1]} each"
    return None


def merge_stages(tile_tokens: int, tile_out: int) -> int:
    """Stages of the pipeline through which the last part of a row reads the others' sums."""
    return min(5, MERGED_BYTES // (tile_tokens * tile_out * 4) + 1)


def make_split_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    block: tuple[int, int],
    tokens: int,
    tile_tokens: int,
    tile_out: int,
    n_programs: int,
    turns: Sequence[int] = (1,),
    item_size: int = 2,
) -> SplitSchedule:
    """The schedule of one layer for one number of tokens; pure; some milliseconds of host time.

    Args:
        indptr, indices: the layout's CSR (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN); tile_out: outputs of a program, BLOCK_OUT or a part of it.
        tokens: rows of x; tile_tokens: rows of a program.
        n_programs: the GPU's multiprocessors.
        turns: programs on each of them to cut for; see :data:`TURNS`.
        item_size: bytes of an element of x.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    block_out, block_in = block
    pointers = indptr.cpu().numpy()
    columns = indices.cpu().numpy() * block_in
    counts = np.diff(pointers).tolist()
    slices, tiles = ceil_div(block_out, tile_out), ceil_div(tokens, tile_tokens)
    tile_bytes = (tile_tokens + tile_out) * block_in * item_size
    sums_bytes = tile_tokens * tile_out * 4
    costs = PartCosts(FIXED_CLOCKS, SYNCHRONISE_CLOCKS, sums_bytes / MERGE_BYTES_PER_CLOCK)
    row_costs = [tile_bytes / BYTES_PER_CLOCK * count for count in counts]
    copies = slices * tiles
    cuts = [[1] * len(counts), *(choose_parts(row_costs, counts, copies, turn * n_programs, costs) for turn in turns)]
    stages = [SHARING_STAGES if shares_processors(parts, copies, n_programs) else STAGES for parts in cuts]
    resident = [resident_programs(tile_tokens, tile_out, each) for each in stages]
    clocks = [
        Clocks().of_launch(counts, parts, copies, tile_bytes, sums_bytes, n_programs, each)
        for parts, each in zip(cuts, resident)
    ]
    best = clocks.index(min(clocks))
    n_parts = cuts[best]
    records = []
    place = 0
    for row, parts in enumerate(n_parts):
        for piece in range(slices):
            for part, (begin, end) in enumerate(cut(counts[row], parts)):
                first = int(pointers[row]) + begin
                head = [row * slices + piece, first, end - begin, parts, place, place + part, 0, 0]
                records.append(head + columns[first : first + end - begin].tolist())
            place += parts if parts > 1 else 0
    records.sort(key=lambda record: -record[2])
    width = ceil_div(len(records[0]), HEAD_FIELDS) * HEAD_FIELDS
    table = [record + [PAST] * (width - len(record)) for record in records]
    return SplitSchedule(
        parts=torch.tensor(table, dtype=torch.int32, device=indptr.device),
        counters=torch.zeros((tiles, place), dtype=torch.int32, device=indptr.device),
        clocks=clocks[best],
        stages=stages[best],
    )
