"""The Hopper linear layer's offline schedule: replayed in plain torch it must compute x W^T, each block once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tetris.kernels.hopper.linear_schedule import STAGE_K, STRIP, LinearSchedule, make_linear_schedule, match_rows
from tetris.layout import BlockLayout, ceil_div
from tetris.packing import pack


def layout_of(shape: tuple[int, int], block: tuple[int, int], kept: float, seed: int = 0) -> BlockLayout:
    generator = torch.Generator().manual_seed(seed)
    grid = ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])
    return BlockLayout.from_mask(torch.rand(grid, generator=generator) < kept, shape, block).without_empty_rows()


def schedule_of(layout: BlockLayout, tokens: int = 300, tile_tokens: int = 128, n_programs: int = 5) -> LinearSchedule:
    return make_linear_schedule(
        layout.indptr,
        layout.indices,
        block=layout.block,
        tokens=tokens,
        tile_tokens=tile_tokens,
        n_programs=n_programs,
    )


def box(matrix: torch.Tensor, row: int, column: int, rows: int, columns: int) -> torch.Tensor:
    """What a tensor descriptor loads: zeros outside of the matrix."""
    tile = torch.zeros(rows, columns, dtype=matrix.dtype)
    inside = matrix[row : row + rows, column : column + columns]
    tile[: inside.shape[0], : inside.shape[1]] = inside
    return tile


def tasks_of(schedule: LinearSchedule) -> list[list[int]]:
    """The records of all programs' tasks, program by program."""
    table = schedule.tasks
    return [table[turn, p].tolist() for p in range(table.shape[1]) for turn in range(int(table[0, p, 10]))]


def replay(schedule: LinearSchedule, layout: BlockLayout, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Runs the schedule as the device code does: stages in order, both strips of a pair, all tasks of all programs."""
    block_out, block_in = layout.block
    tile_k = min(block_in, STAGE_K)
    parts, group = max(1, STRIP // block_out), STAGE_K // tile_k
    rows = STRIP // parts
    weights = values.reshape(-1, block_in)
    y = torch.full((len(x), layout.shape[0]), torch.nan, dtype=x.dtype)
    sums: dict[int, dict[int, torch.Tensor]] = {}
    for number, task in enumerate(tasks_of(schedule)):
        token, first, n_stages, *features, pieces, first_place, place = task[:10]
        acc = torch.zeros(2, STRIP, schedule.tile_tokens, dtype=x.dtype)
        for meta, *inputs_and_tiles in schedule.entries[first : first + n_stages].tolist():
            inputs, tiles = inputs_and_tiles[: -2 * group * parts], inputs_and_tiles[-2 * group * parts :]
            inputs = inputs if len(inputs) == group else [inputs[0] + g * tile_k for g in range(group)]
            assert meta >> 8 == (meta & 255).bit_count()
            for index in range(2 * group):
                strip, g = divmod(index, group)
                under = tiles[index * parts : (index + 1) * parts]
                kept = bool(meta >> (4 * strip + g) & 1)
                assert all((tile >= 0) == kept for tile in under)
                if kept:
                    w = torch.cat([box(weights, tile, inputs[g] % block_in, rows, tile_k) for tile in under])
                    acc[strip] += w @ box(x, token, inputs[g], schedule.tile_tokens, tile_k).T
        if pieces > 1:
            assert first_place <= place < first_place + pieces <= len(schedule.counters)
            done = sums.setdefault(first_place, {})
            assert place not in done, "summed twice"
            done[place] = acc
            if len(done) < pieces:
                continue
            acc = sum(done.values())
        for part, feature in enumerate(features[: 2 * parts]):
            target = y[token : token + schedule.tile_tokens, feature : feature + rows]
            assert target.isnan().all(), f"task {number} stores twice"
            source = acc.reshape(2 * parts, rows, -1)[part].T
            target.copy_(source[: target.shape[0], : target.shape[1]])
    return y


@pytest.mark.parametrize("block", [(32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (128, 16), (128, 128), (192, 64)])
@pytest.mark.parametrize("shape", [(384, 256), (200, 264), (64, 64)])
def test_replay_is_the_product(block: tuple[int, int], shape: tuple[int, int]) -> None:
    layout = layout_of(shape, block, 0.4)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = layout.to_mask().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    x = torch.randn(300, shape[1], generator=generator, dtype=torch.float64)
    y = replay(schedule_of(layout), layout, pack(dense * kept, layout), x)
    torch.testing.assert_close(y, x @ (dense * kept).T)


@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 16)])
def test_replay_of_cut_pairs_is_the_product(block: tuple[int, int]) -> None:
    """Few tokens, many programs, rows of very different lengths: pairs are cut into two to dozens of pieces."""
    rows = torch.arange(512 // block[0])[:, None]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(len(rows), 8192 // block[1], generator=generator) < 0.9 / (1 + rows)
    layout = BlockLayout.from_mask(mask, (512, 8192), block).without_empty_rows()
    schedule = schedule_of(layout, tokens=200, n_programs=64)
    pieces = {task[7] for task in tasks_of(schedule)}
    assert min(pieces) >= 1 and max(pieces) >= 4 and schedule.counters.abs().sum() == 0
    dense = torch.randn(512, 8192, generator=generator, dtype=torch.float64)
    dense *= layout.to_mask().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    x = torch.randn(200, 8192, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(replay(schedule, layout, pack(dense, layout), x), x @ dense.T)


def test_rows_without_blocks_store_zeros() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    layout = BlockLayout.from_mask(mask, (256, 256), (64, 64))
    dense = torch.zeros(256, 256, dtype=torch.float64)
    dense[64:128, 128:192] = 1.0
    x = torch.randn(300, 256, dtype=torch.float64)
    torch.testing.assert_close(replay(schedule_of(layout), layout, pack(dense, layout), x), x @ dense.T)


def test_cutting_shortens_the_longest_task() -> None:
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[:, 0] = mask[0] = True  # one heavy row
    layout = BlockLayout.from_mask(mask, (2048, 4096), (64, 64))
    most = max(task[2] for task in tasks_of(schedule_of(layout, tokens=512, n_programs=132)))
    assert most <= 16
    whole = schedule_of(layout, tokens=512, n_programs=4)
    assert max(task[2] for task in tasks_of(whole)) == 64 and len(whole.counters) == 0, "other work fills the time"


def test_every_task_runs_once_and_lists_cover_all_programs() -> None:
    layout = layout_of((512, 512), (64, 64), 0.3)
    schedule = schedule_of(layout, tokens=1000)
    tasks = [(task[0], task[1]) for task in tasks_of(schedule)]
    assert len(tasks) == len(set(tasks)) == 8 * len({first for _, first in tasks})
    assert schedule.tasks.shape[1] == 5


def test_strips_with_the_same_blocks_fetch_every_tile_once() -> None:
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[0, :8] = mask[3, :8] = mask[1, 8:] = mask[2, 8:] = True
    schedule = schedule_of(BlockLayout.from_mask(mask, (256, 1024), (64, 64)))
    assert (schedule.fetched_stages, schedule.products) == (16, 32)
    assert {tuple(sorted(task[3:5])) for task in tasks_of(schedule)} == {(0, 192), (64, 128)}


def test_matching_joins_every_row_once_and_beats_neighbours() -> None:
    mask = np.random.default_rng(0).random((63, 128)) < 0.27
    couples = match_rows(mask)
    assert sorted(row for couple in couples for row in couple) == list(range(63))
    assert [len(couple) for couple in couples].count(1) == 1
    common = sum((mask[a] & mask[b]).sum() for a, b in (c for c in couples if len(c) == 2))
    neighbours = sum((mask[a] & mask[a + 1]).sum() for a in range(0, 62, 2))
    assert common > 1.4 * neighbours


def test_rows_of_32_that_keep_the_same_blocks_are_joined_without_zeros() -> None:
    mask = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) < 0.3
    layout = BlockLayout.from_mask(mask.repeat(4, 1), (512, 1024), (32, 32)).without_empty_rows()
    assert schedule_of(layout).products == layout.n_blocks * 32 * 32 / (STRIP * STAGE_K)


def test_stages_ascend_within_a_pair() -> None:
    schedule = schedule_of(layout_of((512, 1024), (64, 16), 0.3))
    for _, first, n_stages, *_ in tasks_of(schedule):
        columns = schedule.entries[first : first + n_stages, 1]
        assert bool((columns.diff() > 0).all())


def test_narrow_blocks_are_gathered_only_where_their_neighbours_are_pruned() -> None:
    """32 inputs: scattered blocks are gathered two by two, adjacent ones fetched as one tile of 64."""
    scattered = torch.zeros(2, 64, dtype=torch.bool)
    scattered[:, ::2] = True
    adjacent = torch.zeros(2, 64, dtype=torch.bool)
    adjacent[:, :32] = True
    for mask, gathered in ((scattered, True), (adjacent, False)):
        schedule = schedule_of(BlockLayout.from_mask(mask, (256, 2048), (128, 32)), tile_tokens=256)
        assert (schedule.entries.shape[1] == 1 + 2 + 4) == gathered
        assert schedule.fetched_stages == 2 * 16
