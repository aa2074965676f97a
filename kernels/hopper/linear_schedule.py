"""The offline schedule of the Hopper linear layer: which strips share input tiles, in what order, on which program.

The pattern of kept blocks never changes, so everything that depends on it is computed once, on the host:

1. *strips* of 64 output features (see ``linear_device``); block rows of 32 are joined two by two, those that keep the
   most input blocks in common first, because the joined strip multiplies the union of the two;
2. *pairs* of strips, again by common inputs: a pair fetches the union of its strips' input tiles of 64 features;
3. the *stages* of every pair, one per fetched input tile, in the order of the inputs: programs that work on the same
   tokens at the same time sweep the inputs together and meet in the L2 cache;
4. *pieces* of pairs: those that would keep a program busy for too long are cut along the inputs (``splitting``);
5. the *tasks*, one per (token tile, piece), dealt to the programs in the order of the tokens (see ``schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tetris.kernels.hopper.linear_clocks import STAGE_K, STRIP, LinearClocks, stage_bytes
from tetris.kernels.hopper.schedule import Schedule, make_schedule
from tetris.kernels.splitting import choose_parts, cut
from tetris.layout import ceil_div

TASK_FIELDS = 16
BYTES_PER_CLOCK = 37
"""What the L2 cache delivers to one of an H200's 132 multiprocessors while all of them fetch (8.2 TB/s in all)."""
CLOCKS_PER_ROW = 2.1
"""What the copy engine takes for a row of a tile, however short: narrow tiles fetch slower than the cache delivers."""
CLOCKS_PER_PRODUCT = 2.0
"""One strip x one token x 64 inputs on the matrix unit: 512 clocks for 256 tokens."""
FETCHING = LinearClocks(byte_rate=BYTES_PER_CLOCK, row=CLOCKS_PER_ROW, product=CLOCKS_PER_PRODUCT)
"""What chooses between gathered and whole input tiles: while all multiprocessors fetch as much as they can."""
STAYS_IN_L2 = 16 << 20
"""Bytes of x; an H200 has 50 MB in two halves, and weights and outputs pass through them, too."""
WORTH_MIXING = 1.03
"""What balance must gain for tasks to leave the order of the tokens."""
NO_WORSE = 1.001
"""Where it gains no more than this they do not at all."""


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """What the device code walks through; all int32 tensors on one device.

    Attributes:
        entries: [n_stages + 1, 1 + input tiles + weight tiles]: per stage its meta word (bits 0-3 and 4-7: which weight
            tiles of strip 0 and 1 are kept, from bit 8 on: how many); the first input feature of its 64, or of every
            gathered tile; per weight tile (strip, then input, then part) its first row in ``values.view(-1,
            BLOCK_IN)``, past the end = zeros, -1 = not kept. The last is empty.
        tasks: [most tasks of a program, programs, 16]: first token; first entry; number of stages;
            first output feature of each of up to four parts (strip 0's, then strip 1's); number of pieces of the pair;
            place of its first piece and of this piece among all pieces of cut pairs; tasks of the program; unused.
        counters: [pieces of cut pairs, 2 strips], zeros: pieces of a pair, at its first piece, that are done. A launch
            counts them up and back to zero: two launches with the same schedule must not run at the same time.
        tile_tokens: tokens per task.
        fetched_stages: input tiles that the pairs fetch per token tile.
        products: (strip, 64 inputs) products per token tile; over the kept weights' share it says what padding costs.
        clocks: estimate of a launch.
    """

    entries: torch.Tensor
    tasks: torch.Tensor
    counters: torch.Tensor
    tile_tokens: int
    fetched_stages: int
    products: float
    clocks: float

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the launcher takes."""
        return [self.entries, self.tasks, self.counters]


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
    mask = np.zeros((len(strips), max(max(s.tiles, default=0) for s in strips) // STAGE_K + 1), bool)
    for row, strip in enumerate(strips):
        mask[row, [k // STAGE_K for k in strip.tiles]] = True
    return [(strips[c[0]], strips[c[1]] if len(c) > 1 else None) for c in match_rows(mask)]


Stages = list[list[int]]


def _pair_stages(pair: tuple[_Strip, _Strip | None], tile_k: int, gather: bool) -> Stages:
    """The entries of a pair's stages in the order of the inputs.

    Args:
        tile_k: inputs of a weight tile.
        gather: a stage takes the next 64 / tile_k input tiles that are kept by a strip, else 64 neighbouring inputs.
    """
    absent = (-1,) * len(pair[0].features)
    tiles = [pair[0].tiles, pair[1].tiles if pair[1] else {}]
    kept = sorted(tiles[0].keys() | tiles[1].keys())
    group = STAGE_K // tile_k
    if gather:
        inputs = [kept[i : i + group] for i in range(0, len(kept), group)]
    else:
        inputs = [list(range(k, k + STAGE_K, tile_k)) for k in sorted({k // STAGE_K * STAGE_K for k in kept})]
    stages = []
    for ks in inputs:
        masks = [sum(1 << g for g, k in enumerate(ks) if k in strip) for strip in tiles]
        count = sum(mask.bit_count() for mask in masks)
        padded = ks + [-1] * (group - len(ks))
        rows = [row for strip in tiles for k in padded for row in strip.get(k, absent)]
        fetched = [k if k >= 0 else ks[0] for k in padded] if gather else ks[:1]
        stages.append([masks[0] | masks[1] << 4 | count << 8, *fetched, *rows])
    return stages


def _products(stages: Stages, tile_k: int) -> float:
    """Products of one strip and one whole stage."""
    return _weight_tiles(stages) * tile_k / STAGE_K


def _weight_tiles(stages: Stages) -> int:
    """Kept ones of ``tile_k`` inputs."""
    return sum(stage[0] >> 8 for stage in stages)


def _busiest(dealt: Schedule, clocks: list[float], fixed: float) -> float:
    """Clocks of the program that has most to do."""
    loads = torch.zeros(len(dealt.order) + 1, dtype=torch.float64)
    loads[1:] = (torch.tensor(clocks, dtype=torch.float64) + fixed)[dealt.order % len(clocks)].cumsum(0)
    ends = loads[dealt.program_ptr]
    return float(ends.diff().max())


def _deal(
    clocks: list[float], fixed: float, n_tiles: int, n_programs: int, x_bytes: int, memory_clocks: float
) -> Schedule:
    """The tasks in the order of the tokens, mixed for balance as little as balance needs.

    What runs at the same time should read the same tokens: 256 of 14336 inputs are 7 MB, and of a random layout six
    such tiles are in use at a time in strict order, 12 with the last four rounds dealt longest first, 25 with swaps
    (H200, 8192 tokens at 10 %: 200, 252, 260 us). Inputs that stay in L2 need no order: balance is everything. Where
    memory takes longer than the busiest program, order is (1x1 1024 -> 256 at 14 x 14, tasks of 256 pixels: 17.9 us in
    strict order, else 19.6).
    """
    if x_bytes <= STAYS_IN_L2:
        return make_schedule(clocks, n_tiles, n_programs, tile_cost=fixed)
    strict, *dealt = [
        make_schedule(clocks, n_tiles, n_programs, tile_cost=fixed, balanced_rounds=rounds, swaps=False)
        for rounds in (0, 1, 2, 4)
    ]
    least = min(_busiest(schedule, clocks, fixed) for schedule in dealt)
    if _busiest(strict, clocks, fixed) <= max(memory_clocks, NO_WORSE * least):
        return strict
    enough = WORTH_MIXING * min(schedule.makespan for schedule in dealt)
    return next(schedule for schedule in dealt if schedule.makespan <= enough)


def _task_table(dealt: Schedule, pieces: list[list[int]], tile_tokens: int, places: int) -> torch.Tensor:
    """The records of all tasks: round by round, one of every program; see :class:`LinearSchedule`."""
    records = torch.tensor(pieces, dtype=torch.int32)[dealt.order % len(pieces)]
    tile = dealt.order // len(pieces)
    records[:, 0] = tile * tile_tokens
    records[:, 8:10] += (tile * places)[:, None]
    counts = dealt.program_ptr.diff()
    table = torch.zeros((int(counts.max()), len(counts), TASK_FIELDS), dtype=torch.int32)
    program = torch.arange(len(counts)).repeat_interleave(counts)
    turn = torch.arange(len(dealt.order)) - dealt.program_ptr[program]
    table[turn, program, : records.shape[1]] = records
    table[:, :, records.shape[1]] = counts
    return table


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
    model, x_tiles = LinearClocks(), {False: 1, True: STAGE_K // tile_k}
    found = {
        gather: [_pair_stages(pair, tile_k, gather) for pair in pairs]
        for gather in ((False, True) if tile_k < STAGE_K else (False,))
    }

    def clocks_of(how: LinearClocks, gather: bool) -> list[float]:
        return [
            how.of_stages(len(stages), _weight_tiles(stages), tile_k, x_tiles[gather], tile_tokens)
            for stages in found[gather]
        ]

    gather = min(found, key=lambda gather: sum(clocks_of(FETCHING, gather)))
    chosen, clocks = found[gather], clocks_of(model, gather)
    n_tiles = ceil_div(tokens, tile_tokens)
    costs = model.part_costs(tile_tokens)
    n_pieces = choose_parts(clocks, [len(stages) for stages in chosen], n_tiles, n_programs, costs)
    entries: Stages = []
    pieces, piece_clocks = [], []
    place = 0
    for pair, stages, clock, n in zip(pairs, chosen, clocks, n_pieces):
        features = pair[0].features + (pair[1].features if pair[1] else (past_features,) * parts)
        features += (past_features,) * (4 - len(features))
        for piece, (begin, end) in enumerate(cut(len(stages), n)):
            pieces.append([0, len(entries) + begin, end - begin, *features, n, place, place + piece])
            piece_clocks.append(clock / n + (costs.synchronise + 2 * costs.merge if n > 1 else 0))
        entries += stages
        place += n if n > 1 else 0
    fetched = len(entries)
    entries.append([0] * len(entries[0]))
    inputs = block[1] * len(np.unique(idx))
    x_bytes = 2 * tokens * block[1] * (int(idx.max(initial=0)) + 1)
    memory_bytes = 2 * (tokens * (inputs + past_features) + len(idx) * block[0] * block[1])
    dealt = _deal(piece_clocks, costs.fixed, n_tiles, n_programs, x_bytes, memory_bytes / model.memory_rate)
    weight_tiles = sum(map(_weight_tiles, chosen))
    fetched_bytes = stage_bytes(fetched, weight_tiles, tile_k, tile_tokens) * n_tiles / n_programs
    device = indptr.device
    return LinearSchedule(
        entries=torch.tensor(entries, dtype=torch.int32, device=device),
        tasks=_task_table(dealt, pieces, tile_tokens, place).to(device),
        counters=torch.zeros((place * n_tiles, 2), dtype=torch.int32, device=device),
        tile_tokens=tile_tokens,
        fetched_stages=fetched,
        products=sum(_products(stages, tile_k) for stages in chosen),
        clocks=model.of_launch(_busiest(dealt, piece_clocks, costs.fixed), fetched_bytes, memory_bytes),
    )
