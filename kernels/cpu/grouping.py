"""Block rows -> groups of rows that share one dense product on a CPU.

A CPU runs a few large dense operations well and many small ones badly, so rows that keep the same inputs become one
operation, and rows that keep similar inputs may: the union of their inputs costs some products with zeros but saves
an operation, a gather and a write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tetris.layout import BlockLayout
from tetris.packing import unpack


@dataclass(frozen=True)
class RowGroup:
    """One dense operation of the CPU path.

    Attributes:
        outputs: int64 [group outputs]; the reordered output channels it computes, ascending.
        inputs: int64 [group inputs]; the channels of x it reads.
        input_slice: the inputs as a slice where they are consecutive: no gather is needed then.
        weight: [group outputs, group inputs, ...], dense; blocks that a member row does not keep are zero.
    """

    outputs: torch.Tensor
    inputs: torch.Tensor
    input_slice: slice | None
    weight: torch.Tensor


def as_slice(indices: torch.Tensor) -> slice | None:
    """The slice that selects the same elements, if the indices are consecutive."""
    first = int(indices[0])
    return slice(first, first + len(indices)) if bool((indices.diff() == 1).all()) else None


def equal_rows(mask: torch.Tensor) -> list[list[int]]:
    """Block rows with equal kept inputs, together; groups in the order of their first row."""
    groups: dict[bytes, list[int]] = {}
    for row, pattern in enumerate(mask.cpu().numpy()):
        groups.setdefault(pattern.tobytes(), []).append(row)
    return list(groups.values())


def merge_similar(mask: torch.Tensor, overhead: float) -> list[list[int]]:
    """Groups of block rows of about the least cost: greedily merge the pair that saves most until none saves.

    A group of r rows whose union keeps u block columns costs ``r * u + overhead * (u + r)``: its block products, and
    reading its inputs and writing its outputs, in units of one block product.

    Args:
        mask: bool [block rows, block columns], True = kept.
        overhead: cost of moving one block of channels relative to one block product.
    """
    groups = equal_rows(mask)
    unions = [mask[group[0]].clone() for group in groups]

    def cost(n_rows: int, union: torch.Tensor) -> float:
        columns = int(union.sum())
        return n_rows * columns + overhead * (columns + n_rows)

    while len(groups) > 1:
        best, pair = 0.0, None
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                apart = cost(len(groups[i]), unions[i]) + cost(len(groups[j]), unions[j])
                saved = apart - cost(len(groups[i]) + len(groups[j]), unions[i] | unions[j])
                if saved > best:
                    best, pair = saved, (i, j)
        if pair is None:
            break
        i, j = pair
        groups[i], unions[i] = sorted(groups[i] + groups[j]), unions[i] | unions[j]
        del groups[j], unions[j]
    return groups


def dense_groups(
    values: torch.Tensor,
    layout: BlockLayout,
    groups: list[list[int]],
    kernel_size: tuple[int, ...] = (),
    input_permutation: torch.Tensor | None = None,
) -> list[RowGroup]:
    """The dense operations of the groups; the input permutation is folded into the channels that each reads."""
    dense = unpack(values, layout, kernel_size)
    mask = layout.to_mask()
    result = []
    for rows in groups:
        outputs = _channels(torch.tensor(rows), layout.block[0], layout.shape[0])
        kept = _channels(mask[rows].any(0).nonzero()[:, 0].cpu(), layout.block[1], layout.shape[1])
        if not len(kept):
            kept = torch.zeros(1, dtype=torch.long)
        sources = kept if input_permutation is None else input_permutation.cpu()[kept]
        order = sources.argsort()
        weight = dense[outputs][:, kept[order]].contiguous()
        result.append(RowGroup(outputs, sources[order], as_slice(sources[order]), weight))
    return result


def _channels(blocks: torch.Tensor, size: int, limit: int) -> torch.Tensor:
    """The channels of the blocks, without those past the last."""
    channels = (blocks[:, None] * size + torch.arange(size)).reshape(-1)
    return channels[channels < limit]
