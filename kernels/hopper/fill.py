"""Which strips of output channels keep no block, and how their stores ride along with the loads of the others."""

from __future__ import annotations

import torch

from tetris.kernels.configs import Conv2dProblem
from tetris.kernels.hopper.geometry import FILL_PIXELS, WGMMA_ROWS
from tetris.kernels.hopper.pairing import PairedRows
from tetris.layout import ceil_div


def idle_block_rows(indptr: torch.Tensor, values: torch.Tensor | None) -> list[bool]:
    """Whether each block row adds nothing: it keeps no block, or a single one that holds zeros only.

    Args:
        indptr: of the block layout.
        values: the packed blocks; None = no block counts as zeros. On a GPU looking at them synchronizes.
    """
    sizes, first = indptr.cpu().diff(), indptr[:-1].long()
    idle = sizes == 0
    if values is not None:
        single = sizes == 1
        blocks = values[first[single.to(first.device)].to(values.device)]
        idle[single] = (blocks == 0).flatten(1).all(1).cpu()
    return idle.tolist()


def idle_rows(idle: list[bool], halves: int, pairs: PairedRows | None) -> tuple[list[int], list[int]]:
    """(rows of tiles that add nothing, first output channels of their strips) for the block rows that are ``idle``.

    Args:
        idle: of every block row.
        halves: rows of tiles in a block row; 1 where they run in ``pairs``.
    """
    if pairs is None:
        rows = [row * halves + half for row, is_idle in enumerate(idle) if is_idle for half in range(halves)]
        return rows, [row * WGMMA_ROWS for row in rows]
    known = [*idle, True]  # the row that stands for none
    members = pairs.rows.view(-1, 2).tolist()
    rows = [pair for pair, both in enumerate(members) if all(known[row] for row in both)]
    width = WGMMA_ROWS // 2
    return rows, [row * width for pair in rows for row in members[pair] if row < len(idle)]


def filling_pays(problem: Conv2dProblem, idle: int, rows: int) -> bool:
    """Whether the strips of ``idle`` of the ``rows`` of tiles are better filled beside the others' products.

    Not where loads or stores decide anyway: with a stride, or where the strips are half of the output. H200, a quarter
    kept: 256 -> 256 at 56 x 56 188.7 -> 182.5 us, 512 -> 512 at 28 x 28 172.6 -> 169.5; but stride 2 147.7 -> 155.4,
    and with few tiles, 512 -> 512 at 14 x 14, 49.7 -> 50.6.
    """
    return 0 < 3 * idle <= rows and problem.stride == (1, 1)


def fill_tensor(channels: list[int], pixels: int, steps: int) -> torch.Tensor:
    """int32 [1 + strips]: chunks of pixels to store after every step's loads, then the strips' first ``channels``.

    Args:
        channels: of every strip.
        pixels: of the output.
        steps: of all programs together.
    """
    burst = ceil_div(len(channels) * ceil_div(pixels, FILL_PIXELS), max(1, steps))
    return torch.tensor([burst, *channels] if channels else [], dtype=torch.int32)
