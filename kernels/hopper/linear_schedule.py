"""The offline schedule of the Hopper linear layer: which strips share input tiles, in what order, on which program.

The pattern of kept blocks never changes, so everything that depends on it is computed once, on the host:

1. *strips* of 64 output features (see ``linear_device``); block rows of 32 are joined two by two, those that keep the
   most input blocks in common first, because the joined strip multiplies the union of the two;
2. *pairs* of strips, again by common inputs: a pair fetches the union of its strips' input tiles of 64 features;
3. the *stages* of every pair, one per fetched input tile, in the order of the inputs: programs that work on the same
   tokens at the same time sweep the inputs together and meet in the L2 cache;
4. the *tasks*, one per (token tile, pair), dealt to the programs in the order of the tokens (see ``schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tetris.kernels.hopper.schedule import Schedule, make_schedule
from tetris.layout import ceil_div

STRIP = 64
STAGE_K = 64
PAIR_FIELDS = 8
FETCH_COST = 1.3
"""Time to fetch a stage over the time to multiply one strip's 64 features of it (H200: both alternate as the bound)."""
FIXED_COST = 3.0
"""Cost of a task's prologue and epilogue, in products of one strip and one whole stage."""


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """What the device code walks through; all int32 tensors on one device.

    Attributes:
        pairs: [n_pairs, 8]: first entry, number of stages, first output feature of each of up to four parts (strip 0's,
            then strip 1's).
        entries: [n_stages + 1, 2 + tiles]: per stage its first input feature; its meta word (bits 0-3 and 4-7: which
            weight tiles of strip 0 and 1 are kept, from bit 8 on: how many); per weight tile (strip, then input, then
            part) its first row in ``values.view(-1, BLOCK_IN)``, past the end = zeros, -1 = not kept. The last is
            empty.
        tasks: token tile * n_pairs + pair, dealt to the programs.
        tile_tokens: tokens per task.
        fetched_stages: input tiles that the pairs fetch per token tile.
        products: (strip, 64 inputs) products per token tile; over the kept weights' share it says what padding costs.
    """

    pairs: torch.Tensor
    entries: torch.Tensor
    tasks: Schedule
    tile_tokens: int
    fetched_stages: int
    products: float

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes: pairs, entries, program_ptr, order."""
        return [self.pairs, self.entries, self.tasks.program_ptr, self.tasks.order]


def match_rows(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Joins rows two by two so that the joined rows have many columns in common; an odd row stays alone.

    Greedy by the number of common columns, then improved by exchanging partners between couples while that helps.

    Args:
        mask: bool [rows, columns], the kept blocks.
    Returns:
        Tuples of one or two row indices, in ascending order of their first.
    Cost: O(rows^2 columns) for the common columns and O(rows^2 log rows) for the rest.
    """
    n = len(mask)
    common = mask.astype(np.float32) @ mask.astype(np.float32).T
    first, second = np.triu_indices(n, 1)
    free = np.ones(n, bool)
    couples: list[list[int]] = []
    for k in np.argsort(-common[first, second], kind="stable"):
        a, b = int(first[k]), int(second[k])
        if free[a] and free[b]:
            free[a] = free[b] = False
            couples.append([a, b])
    _exchange_partners(couples, common)
    return sorted([(min(c), max(c)) for c in couples] + [(int(a),) for a in np.flatnonzero(free)])


def _exchange_partners(couples: list[list[int]], common: np.ndarray, sweeps: int = 8) -> None:
    """Improves ``couples`` in place: of every two couples keeps the best of the three ways to pair their four rows."""
    for _ in range(sweeps):
        improved = False
        left, right = np.array([c[0] for c in couples]), np.array([c[1] for c in couples])
        for i in range(len(couples)):
            a, b = left[i], right[i]
            now = common[a, b] + common[left, right]
            parallel = common[a, left] + common[b, right] - now
            crossed = common[a, right] + common[b, left] - now
            parallel[i] = crossed[i] = 0
            j = int(np.argmax(np.maximum(parallel, crossed)))
            if max(parallel[j], crossed[j]) <= 0:
                continue
            improved = True
            if parallel[j] >= crossed[j]:
                right[i], left[j] = left[j], b
            else:
                right[i], right[j] = right[j], b
        couples[:] = [[int(a), int(b)] for a, b in zip(left, right)]
        if not improved:
            return


@dataclass(frozen=True)
class _Strip:
    """One strip: the output feature and the weight row of each part per kept input tile."""

    features: tuple[int, ...]
    tiles: dict[int, tuple[int, ...]]


def _strips(indptr: np.ndarray, indices: np.ndarray, block: tuple[int, int], tile_k: int) -> list[list[_Strip]]:
    """The strips, those that must stay side by side in one list. ``tiles``: first input feature -> weight rows."""
    block_out, block_in = block
    n_rows = len(indptr) - 1
    past_the_end = len(indices) * block_out
    rows: list[dict[int, int]] = []
    for begin, end in pairwise(indptr):
        blocks = [(int(column) * block_in, b * block_out) for b, column in enumerate(indices[begin:end], int(begin))]
        rows.append({first + k: weight_row for first, weight_row in blocks for k in range(0, block_in, tile_k)})
    if block_out >= STRIP:
        return [
            [
                _Strip((r * block_out + o,), {k: (w + o,) for k, w in rows[r].items()})
                for o in range(0, block_out, STRIP)
            ]
            for r in range(n_rows)
        ]
    mask = np.zeros((n_rows, int(indices.max(initial=0)) + 1), bool)
    mask[np.repeat(np.arange(n_rows), np.diff(indptr)), indices] = True
    strips = []
    for couple in match_rows(mask):
        features = tuple(r * block_out for r in couple) + (n_rows * block_out,) * (2 - len(couple))
        members = [rows[r] for r in couple] + [{}] * (2 - len(couple))
        tiles = {k: tuple(m.get(k, past_the_end) for m in members) for k in sorted(set().union(*members))}
        strips.append([_Strip(features, tiles)])
    return strips


def _pairs(groups: list[list[_Strip]]) -> list[tuple[_Strip, _Strip | None]]:
    """Strips of one block row side by side; single strips by common input tiles."""
    if len(groups[0]) % 2 == 0:
        return [(g[i], g[i + 1]) for g in groups for i in range(0, len(g), 2)]
    strips = [strip for group in groups for strip in group]
    mask = np.zeros((len(strips), max(max(s.tiles) for s in strips) // STAGE_K + 1), bool)
    for row, strip in enumerate(strips):
        mask[row, [k // STAGE_K for k in strip.tiles]] = True
    return [(strips[c[0]], strips[c[1]] if len(c) > 1 else None) for c in match_rows(mask)]


def _pair_stages(pair: tuple[_Strip, _Strip | None], tile_k: int) -> tuple[list[list[int]], float]:
    """The entries of a pair's stages in the order of the inputs, and its products of one strip and one whole stage."""
    absent = (-1,) * len(pair[0].features)
    tiles = [pair[0].tiles, pair[1].tiles if pair[1] else {}]
    entries, kept = [], 0
    for first in sorted({k // STAGE_K * STAGE_K for k in tiles[0].keys() | tiles[1].keys()}):
        inputs = range(first, first + STAGE_K, tile_k)
        masks = [sum(1 << g for g, k in enumerate(inputs) if k in strip) for strip in tiles]
        count = sum(mask.bit_count() for mask in masks)
        rows = [row for strip in tiles for k in inputs for row in strip.get(k, absent)]
        entries.append([first, masks[0] | masks[1] << 4 | count << 8, *rows])
        kept += count
    return entries, kept * tile_k / STAGE_K


def make_linear_schedule(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    block: tuple[int, int],
    tokens: int,
    tile_tokens: int,
    n_programs: int,
) -> LinearSchedule:
    """The schedule of one layer for one number of tokens; pure; 10 to 200 ms of host time.

    Args:
        indptr, indices: the layout's CSR (int32), every block row with at least one block.
        block: (BLOCK_OUT, BLOCK_IN): 32 or a multiple of 64 outputs, a power of two from 16 inputs.
        tokens: rows of x; tile_tokens: rows per task.
        n_programs: persistent programs, the GPU's multiprocessors.
    Returns:
        The schedule, on the device of ``indptr``.
    """
    tile_k = min(block[1], STAGE_K)
    ptr, idx = indptr.cpu().numpy(), indices.cpu().numpy()
    pairs = _pairs(_strips(ptr, idx, block, tile_k))
    parts = len(pairs[0][0].features)
    past_features = (len(ptr) - 1) * block[0]
    entries: list[list[int]] = []
    rows, costs, products = [], [], 0.0
    for pair in pairs:
        features = pair[0].features + (pair[1].features if pair[1] else (past_features,) * parts)
        stages, pair_products = _pair_stages(pair, tile_k)
        rows.append([len(entries), len(stages), *features, *([past_features] * (PAIR_FIELDS - 2 - len(features)))])
        entries += stages
        costs.append(max(pair_products, FETCH_COST * len(stages)))
        products += pair_products
    fetched = len(entries)
    entries.append([0] * len(entries[0]))
    tasks = make_schedule(costs, ceil_div(tokens, tile_tokens), n_programs, tile_cost=FIXED_COST)
    device = indptr.device
    return LinearSchedule(
        pairs=torch.tensor(rows, dtype=torch.int32, device=device),
        entries=torch.tensor(entries, dtype=torch.int32, device=device),
        tasks=tasks.to(device),
        tile_tokens=tile_tokens,
        fetched_stages=fetched,
        products=products,
    )
