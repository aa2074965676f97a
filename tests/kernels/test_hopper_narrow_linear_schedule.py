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
    stage_slots,
    strip_outputs,
)
from tetris.layout import BlockLayout, ceil_div
from tetris.packing import pack

BLOCKS = [(32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (128, 16), (192, 32)]


def layout_of(shape: tuple[int, int], block: tuple[int, int], kept: float) -> BlockLayout:
    grid = ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < kept
    return BlockLayout.from_mask(mask, shape, block).without_empty_rows()


def schedule_of(layout: BlockLayout, tokens: int = 300, n_programs: int = 5) -> NarrowSchedule:
    return make_narrow_schedule(layout.indptr, layout.indices, block=layout.block, tokens=tokens, n_programs=n_programs)


def replay(schedule: NarrowSchedule, layout: BlockLayout, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Runs the schedule as the device code does; checks that every output is stored once."""
    n, tile_k = strip_outputs(layout.block[0]), layout.block[1]
    lines, slots, strips = values.reshape(-1, 64), stage_slots(layout.block), TILE_OUT // n
    padded = torch.nn.functional.pad(x, (0, STAGE_K + tile_k, 0, TILE_TOKENS))
    y = torch.full((len(padded), layout.shape[0] + 2 * TILE_OUT), torch.nan, dtype=x.dtype)
    for task in schedule.tasks.order.tolist():
        token = task // len(schedule.groups) * TILE_TOKENS
        group = task % len(schedule.groups)
        first, n_stages = schedule.groups[group].tolist()
        sums = torch.zeros(TILE_TOKENS, TILE_OUT, dtype=x.dtype)
        for k, count, mask, *tiles in schedule.entries[first : first + n_stages].tolist():
            assert [tile % slots for tile in tiles[:count]] == [bit for bit in range(slots) if mask >> bit & 1]
            for tile in tiles[:count]:
                g, strip = divmod(tile % slots, strips)
                inputs = padded[token : token + TILE_TOKENS, k + g * tile_k : k + (g + 1) * tile_k]
                row = tile // slots
                weight = lines[row : row + n * tile_k // 64].reshape(n, tile_k)
                sums[:, strip * n : (strip + 1) * n] += inputs @ weight.T
        target = y[token : token + TILE_TOKENS, group * TILE_OUT : (group + 1) * TILE_OUT]
        assert target.isnan().all(), "stored twice"
        target.copy_(sums)
    return y[: len(x), : layout.shape[0]]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(384, 256), (200, 264), (64, 64), (1056, 512)])
def test_replay_is_the_product(block: tuple[int, int], shape: tuple[int, int]) -> None:
    layout = layout_of(shape, block, 0.4)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = layout.to_mask().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    x = torch.randn(300, shape[1], generator=generator, dtype=torch.float64)
    y = replay(schedule_of(layout), layout, pack(dense * kept, layout), x)
    torch.testing.assert_close(y, x @ (dense * kept).T)


def test_stages_ascend_and_hold_every_kept_tile_once() -> None:
    layout = layout_of((512, 1024), (64, 16), 0.1)
    schedule = schedule_of(layout)
    assert int(schedule.entries[:, 1].sum()) == layout.n_blocks and not schedule.entries[-1].any()
    for first, n_stages in schedule.groups.tolist():
        assert bool((schedule.entries[first : first + n_stages, 0].diff() > 0).all())


def test_every_task_runs_once_on_some_program() -> None:
    layout = layout_of((4096, 512), (32, 32), 0.27)
    schedule = schedule_of(layout, tokens=8192, n_programs=132)
    assert sorted(schedule.tasks.order.tolist()) == list(range(64 * 16))
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
