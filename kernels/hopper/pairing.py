"""Block rows of 32 output channels run in pairs, because a wgmma instruction has 64 rows.

A pair multiplies the union of its rows' kept input blocks; where one of the rows has none it multiplies zeros. Rows
that keep many input blocks in common are paired first, which keeps the union small.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, eq=False)
class PairedRows:
    """Pairs of block rows as one CSR over the pairs. All int32.

    Attributes:
        indptr: [pairs + 1].
        indices: [entries]; input block of every entry, ascending within a pair.
        blocks: [entries * 2]; the kept block of the pair's first and second row, n_blocks (one past the last) for none.
        rows: [pairs * 2]; block rows of the pair; the number of block rows stands for none.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device | str) -> PairedRows:
        """The same with its tensors on ``device``."""
        return PairedRows(*(t.to(device) for t in (self.indptr, self.indices, self.blocks, self.rows)))


def pair_block_rows(indptr: torch.Tensor, indices: torch.Tensor) -> PairedRows:
    """Pair the block rows of a layout greedily by the most input blocks in common; ties go to the earlier rows.

    Args:
        indptr, indices: the layout's block CSR.
    Returns:
        The pairs, on the CPU; an odd row is paired with none.
    Cost: O(rows^2 log rows) on the CPU.
    """
    bounds, columns = indptr.tolist(), indices.tolist()
    kept = [dict(zip(columns[a:b], range(a, b))) for a, b in pairwise(bounds)]
    wasted = sorted(
        (len(kept[a].keys() ^ kept[b].keys()), a, b) for a in range(len(kept)) for b in range(a + 1, len(kept))
    )
    pairs: list[tuple[int, int]] = []
    free = set(range(len(kept)))
    for _, a, b in wasted:
        if a in free and b in free:
            pairs.append((a, b))
            free -= {a, b}
    pairs += [(row, len(kept)) for row in free]
    kept.append({})  # the row that stands for none
    unions = [sorted(kept[a].keys() | kept[b].keys()) for a, b in pairs]
    entries = [
        kept[row].get(column, len(columns)) for pair, union in zip(pairs, unions) for column in union for row in pair
    ]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    sizes = torch.tensor([0, *(len(union) for union in unions)]).cumsum(0).int()
    return PairedRows(sizes, int32([c for union in unions for c in union]), int32(entries), int32([*sum(pairs, ())]))
