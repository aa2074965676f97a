"""Block rows -> groups of rows that share one dense product on a CPU.

A CPU runs a few large dense operations well and many small ones badly, so rows that keep the same inputs become one
operation, and rows that keep similar inputs may: the union of their inputs costs some products with zeros but saves
an operation, a gather and a write. Channels that no row keeps are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tetris.layout import BlockLayout
from tetris.packing import unpack
from tetris.permutation import inverse

PIXELS = 1024
"""Pixels (or tokens) a call is assumed to have where nobody knows."""


COPY_BYTES = 65536
"""Bytes of a run that are worth a copy of its own. One thread of a Xeon: 25088 rows of 256 fp32 channels, half of
them kept in runs of 32, take 1.2 ms as copies and 2.6 ms as single channels; one row of 4096 takes 52 us and 2 us."""


@dataclass(frozen=True)
class Channels:
    """Some channels of a matrix [rows, channels], ready to be taken.

    Attributes:
        indices: int64, in the order in which they are taken.
        runs: the same as slices of consecutive channels.
    """

    indices: torch.Tensor
    runs: tuple[slice, ...]

    @staticmethod
    def of(indices: torch.Tensor) -> Channels:
        """From int64 indices on any device."""
        indices = indices.cpu()
        starts = [0, *((indices.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(indices)]
        runs = [slice(int(indices[a]), int(indices[a]) + b - a) for a, b in pairwise(starts) if b > a]
        return Channels(indices, tuple(runs))

    def take(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix[:, indices], contiguous: copies of runs where they are long, single channels otherwise."""
        if len(self.runs) == 1:
            return matrix[:, self.runs[0]].contiguous()
        if matrix.shape[0] * len(self.indices) * matrix.element_size() >= COPY_BYTES * len(self.runs):
            return torch.cat([matrix[:, run] for run in self.runs], 1)
        return matrix.index_select(1, self.indices)


@dataclass(frozen=True)
class RowGroup:
    """One dense operation of the CPU path.

    Attributes:
        outputs: int64 [group outputs]; the reordered output channels it computes, ascending.
        inputs: the channels of x it reads.
        weight: [group outputs, group inputs, ...], dense; blocks that a member row does not keep are zero.
    """

    outputs: torch.Tensor
    inputs: Channels
    weight: torch.Tensor


@dataclass(frozen=True)
class CostModel:
    """What a group of block rows costs, in microseconds; only ratios matter.

    Attributes:
        block: (BLOCK_OUT, BLOCK_IN).
        taps: kernel elements, 1 for linear layers.
        pixels: output pixels (tokens) of a call.
        call_us: fixed cost of an operation.
    """

    block: tuple[int, int]
    taps: int
    pixels: int
    call_us: float

    FLOP_PER_US = 50_000.0
    WEIGHT_BYTES_PER_US = 13_000.0
    MOVED_BYTES_PER_US = 5_000.0

    def __call__(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Cost of groups of ``rows`` block rows whose union keeps ``columns`` block columns; any equal shapes."""
        weights = rows * columns * self.block[0] * self.block[1] * self.taps
        product = torch.maximum(2 * weights * self.pixels / self.FLOP_PER_US, 4 * weights / self.WEIGHT_BYTES_PER_US)
        moved = 4 * self.pixels * (rows * self.block[0] + columns * self.block[1])
        return product + moved / self.MOVED_BYTES_PER_US + self.call_us


def equal_rows(mask: torch.Tensor) -> list[list[int]]:
    """Block rows with equal kept inputs, together; groups in the order of their first row."""
    groups: dict[bytes, list[int]] = {}
    for row, pattern in enumerate(mask.cpu().numpy()):
        groups.setdefault(pattern.tobytes(), []).append(row)
    return list(groups.values())


def merge_similar(mask: torch.Tensor, cost: CostModel) -> list[list[int]]:
    """Groups of block rows of about the least cost: greedily merge the pair that saves most until none saves.

    Args:
        mask: bool [block rows, block columns], True = kept.
        cost: of a group, from its number of rows and of kept columns.
    Cost:
        One matrix product of the groups' unions a merge; a second for 450 block rows.
    """
    groups = equal_rows(mask)
    unions = mask.cpu()[[group[0] for group in groups]].double()
    rows = torch.tensor([float(len(group)) for group in groups])
    while len(groups) > 1:
        columns = unions.sum(1)
        merged_columns = columns[:, None] + columns - unions @ unions.T
        apart = cost(rows, columns)
        saved = apart[:, None] + apart - cost(rows[:, None] + rows, merged_columns)
        saved.fill_diagonal_(-1.0)
        i, j = divmod(int(saved.argmax()), len(groups))
        if saved[i, j] <= 0:
            break
        i, j = min(i, j), max(i, j)
        groups[i] = sorted(groups[i] + groups[j])
        unions[i] = torch.maximum(unions[i], unions[j])
        rows[i] += rows[j]
        del groups[j]
        others = torch.arange(len(rows)) != j
        unions, rows = unions[others], rows[others]
    return groups


@dataclass(frozen=True)
class Grouping:
    """The dense operations of a layer and the order of their outputs.

    Attributes:
        groups: the operations.
        computed: the reordered output channels in the order in which the groups compute them.
        stored: where the stored output channels lie among the computed ones.
    """

    groups: list[RowGroup]
    computed: Channels
    stored: Channels

    def biases(self, bias: torch.Tensor | None, dtype: torch.dtype) -> Sequence[torch.Tensor | None]:
        """The groups' parts of a bias [channels] in the order of the block rows."""
        if bias is None:
            return [None] * len(self.groups)
        return self.computed.take(bias.to(dtype)[None])[0].split([len(group.outputs) for group in self.groups])

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The groups' outputs [rows, group outputs] -> [rows, channels] in the stored order."""
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if len(self.stored.runs) == 1 else self.stored.take(y)


def group_layout(
    values: torch.Tensor,
    layout: BlockLayout,
    cost: CostModel,
    *,
    kernel_size: tuple[int, ...] = (),
    input_permutation: torch.Tensor | None = None,
    output_permutation: torch.Tensor | None = None,
) -> Grouping:
    """Choose the groups and make their weights; both permutations are folded in. Cost: one pass over the weight."""
    dense, mask = unpack(values, layout, kernel_size), layout.to_mask()
    groups = []
    for rows in merge_similar(mask, cost):
        outputs = _channels(torch.tensor(rows), layout.block[0], layout.shape[0])
        kept = _channels(mask[rows].any(0).nonzero()[:, 0].cpu(), layout.block[1], layout.shape[1])
        sources = kept if input_permutation is None else input_permutation.cpu()[kept]
        order = sources.argsort()
        weight = dense[outputs][:, kept[order]]
        memory_format = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        groups.append(RowGroup(outputs, Channels.of(sources[order]), weight.contiguous(memory_format=memory_format)))
    computed = torch.cat([group.outputs for group in groups])
    stored = computed if output_permutation is None else output_permutation.cpu()[computed]
    return Grouping(groups, Channels.of(computed), Channels.of(inverse(stored)))


def _channels(blocks: torch.Tensor, size: int, limit: int) -> torch.Tensor:
    """The channels of the blocks, without those past the last."""
    channels = (blocks[:, None] * size + torch.arange(size)).reshape(-1)
    return channels[channels < limit]
