"""The narrow-block schedule replayed in torch computes x W^T; weight tiles arrive as the kernel reads them."""

from __future__ import annotations

import pytest
import torch

from tetris.kernels.hopper.narrow_linear_schedule import (
    STAGE_K,
    TILE_OUT,
    TILE_TOKENS,
    NarrowSchedule,
    make_narrow_schedule,
    ring_stages,
    rings,
    strip_outputs,
    token_halves,
)
from tetris.layout import BlockLayout, ceil_div
from tetris.packing import pack

BLOCKS = [(32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (128, 16), (192, 32)]


def layout_of(shape: tuple[int, int], block: tuple[int, int], kept: float) -> BlockLayout:
    grid = ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < kept
    return BlockLayout.from_mask(mask, shape, block).without_empty_rows()


def schedule_of(layout: BlockLayout, tile_out: int, tokens: int = 300, n_programs: int = 5) -> NarrowSchedule:
    return make_narrow_schedule(
        layout.indptr,
        layout.indices,
        block=layout.block,
        tokens=tokens,
        n_programs=n_programs,
        tile_out=tile_out,
    )


def replay(
    schedule: NarrowSchedule, layout: BlockLayout, tile_out: int, values: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Runs the schedule as the device code does; checks that every output is stored once."""
    n, tile_k, shares = strip_outputs(layout.block, tile_out), layout.block[1], token_halves(layout.block)
    lines, strips, per_stage = values.reshape(-1, 64), tile_out // n // shares, STAGE_K // tile_k
    padded = torch.nn.functional.pad(x, (0, STAGE_K + tile_k, 0, TILE_TOKENS))
    y = torch.full((len(padded), layout.shape[0] + 2 * tile_out), torch.nan, dtype=x.dtype)
    for task in schedule.tasks.order.tolist():
        token = task // len(schedule.groups) * TILE_TOKENS
        group = task % len(schedule.groups)
        first, n_stages, begin, middle, end = schedule.groups[group].tolist()
        sums = torch.zeros(TILE_TOKENS, tile_out, dtype=x.dtype)
        for k, count, mask, *tiles in schedule.entries[first : first + n_stages].tolist():
            bits = [bit for bit in range(24) if mask >> bit & 1]
            assert len(bits) == count <= len(tiles) and bits[-1] < shares * strips * per_stage
            assert mask >> 24 == sum(bit < strips * per_stage for bit in bits), "where the second warp group begins"
            for bit, row in zip(bits, tiles):
                share, g, strip = bit // strips // per_stage, bit // strips % per_stage, bit % strips
                inputs = padded[token : token + TILE_TOKENS, k + g * tile_k : k + (g + 1) * tile_k]
                weight = lines[row : row + n * tile_k // 64].reshape(n, tile_k)
                column = share * (tile_out // 2) + strip * n
                sums[:, column : column + n] += inputs @ weight.T
        halves = ((range(begin, middle), 0), (range(middle, end), tile_out // 2))
        for outputs, share in halves if shares == 2 else ((range(begin, end), 0),):
            assert len(outputs) <= tile_out // shares and outputs.start % 64 == outputs.stop % 64 == 0
            target = y[token : token + TILE_TOKENS, outputs.start : outputs.stop]
            assert target.isnan().all(), "stored twice"
            target.copy_(sums[:, share : share + len(outputs)])
    return y[: len(x), : layout.shape[0]]


@pytest.mark.parametrize("tile_out", TILE_OUT)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(384, 256), (200, 264), (64, 64), (1056, 512)])
def test_replay_is_the_product(block: tuple[int, int], shape: tuple[int, int], tile_out: int) -> None:
    layout = layout_of(shape, block, 0.4)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = layout.to_mask().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    x = torch.randn(300, shape[1], generator=generator, dtype=torch.float64)
    y = replay(schedule_of(layout, tile_out), layout, tile_out, pack(dense * kept, layout), x)
    torch.testing.assert_close(y, x @ (dense * kept).T)


@pytest.mark.parametrize("tile_out", TILE_OUT)
@pytest.mark.parametrize("kept", [0.1, 0.3, 0.9])
def test_stages_ascend_and_hold_every_kept_tile_once(tile_out: int, kept: float) -> None:
    layout = layout_of((512, 1024), (64, 16), kept)
    schedule = schedule_of(layout, tile_out)
    assert int(schedule.entries[:, 1].sum()) == layout.n_blocks and not schedule.entries[-1].any()
    for first, n_stages, *_ in schedule.groups.tolist():
        assert bool((schedule.entries[first : first + n_stages, 0].diff() >= 0).all())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tile_out", TILE_OUT)
def test_fewer_places_make_a_deeper_ring(block: tuple[int, int], tile_out: int) -> None:
    found = rings(block, tile_out)
    assert [ring.stages for ring in found] == sorted((ring.stages for ring in found), reverse=True)
    assert found[-1].places == found[-1].tiles, "at least one ring holds all that a stage may keep"
    for ring in found:
        assert ring_stages(ring.places, ring.tile_bytes) == ring.stages >= 3


def test_stages_that_keep_more_than_there_are_places_are_cut() -> None:
    layout = layout_of((4096, 4096), (32, 32), 0.27)
    schedule = schedule_of(layout, 384, tokens=8192, n_programs=132)
    places = schedule.entries.shape[1] - 3
    assert 6 < places < 24 and int(schedule.entries[:, 1].max()) == places
    inputs = [schedule.entries[first : first + n, 0].tolist() for first, n, *_ in schedule.groups.tolist()]
    assert len(schedule.entries) - 1 > sum(len(set(ks)) for ks in inputs), "some inputs are fetched twice"


@pytest.mark.parametrize(("tile_out", "n_groups"), [(256, 16), (384, 12)])
def test_every_task_runs_once_on_some_program_and_groups_make_the_work_even(tile_out: int, n_groups: int) -> None:
    layout = layout_of((4096, 512), (32, 32), 0.27)
    schedule = schedule_of(layout, tile_out, tokens=8192, n_programs=132)
    assert len(schedule.groups) == n_groups, "11 groups of 384 would be 5.3 rounds of tasks, done in 6"
    assert sorted(schedule.tasks.order.tolist()) == list(range(64 * n_groups))
    assert schedule.tasks.programs == 132 and schedule.tasks.makespan < 1.05


@pytest.mark.parametrize(("n", "tile_k"), [(32, 32), (64, 16), (64, 32), (64, 64), (32, 64), (128, 16), (128, 32)])
def test_rows_of_128_bytes_read_as_a_tile_are_the_tile_with_rows_exchanged(n: int, tile_k: int) -> None:
    """Pieces of 16 bytes: the copy engine swizzles rows of 128 bytes, wgmma reads rows of 2 * tile_k bytes."""
    pieces = tile_k // 8
    block = torch.arange(n * pieces)
    copied = torch.empty_like(block)
    for line in range(len(block) // 8):
        for piece in range(8):
            copied[line * 8 + (piece ^ line % 8)] = block[line * 8 + piece]
    for row in range(n):
        source = row ^ ((row >> 3) % (64 // tile_k))
        for piece in range(pieces):
            address = row * pieces + piece
            swizzled = address ^ ((address >> 3) % pieces)
            assert copied[swizzled] == source * pieces + piece
