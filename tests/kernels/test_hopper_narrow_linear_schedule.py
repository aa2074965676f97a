"""The narrow-block schedule replayed in torch computes x W^T; weight tiles arrive as the kernel reads them."""

from __future__ import annotations

import pytest
import torch

from tetris.kernels.hopper.narrow_linear_schedule import (
    CHUNK,
    STAGE_K,
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


def schedule_of(layout: BlockLayout, tokens: int = 300, tile_out: int = 256, n_programs: int = 5) -> NarrowSchedule:
    return make_narrow_schedule(
        layout.indptr, layout.indices, block=layout.block, tokens=tokens, tile_out=tile_out, n_programs=n_programs
    )


def replay(schedule: NarrowSchedule, layout: BlockLayout, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Runs the schedule as the device code does; checks that every output is stored once."""
    n, tile_k = strip_outputs(layout.block[0]), layout.block[1]
    lines = values.reshape(-1, 64)
    slots = stage_slots(layout.block)
    strips = 256 // n
    padded = torch.nn.functional.pad(x, (0, STAGE_K + tile_k, 0, TILE_TOKENS))
    y = torch.full((len(padded), layout.shape[0] + 256), torch.nan, dtype=x.dtype)
    for task in schedule.tasks.order.tolist():
        token = task // len(schedule.groups) * TILE_TOKENS
        first, n_stages, feature, end = schedule.groups[task % len(schedule.groups)].tolist()
        sums = torch.zeros(TILE_TOKENS, 256, dtype=x.dtype)
        for k, count, mask, *rows in schedule.entries[first : first + n_stages].tolist():
            assert count == mask.bit_count() <= slots
            bits = [bit for bit in range(strips * STAGE_K // tile_k) if mask >> bit & 1]
            for bit, row in zip(bits, rows):
                g, strip = divmod(bit, strips)
                inputs = padded[token : token + TILE_TOKENS, k + g * tile_k : k + (g + 1) * tile_k]
                weight = lines[row : row + n * tile_k // 64].reshape(n, tile_k)
                sums[:, strip * n : (strip + 1) * n] += inputs @ weight.T
        assert y[token : token + TILE_TOKENS, feature:end].isnan().all(), "stored twice"
        y[token : token + TILE_TOKENS, feature:end] = sums[:, : end - feature]
        assert not sums[:, end - feature :].any(), "belongs to another group"
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


def test_a_stage_of_many_tiles_comes_several_times() -> None:
    layout = layout_of((256, 128), (32, 32), 1.1)
    schedule = schedule_of(layout)
    first, n_stages, *_ = schedule.groups[0].tolist()
    assert schedule.entries[first : first + n_stages, 0].tolist() == [0, 0, 64, 64]
    assert int(schedule.entries[:, 1].sum()) == layout.n_blocks


def test_groups_are_whole_output_tiles_and_every_task_runs_once() -> None:
    layout = layout_of((4096, 512), (32, 32), 0.27)
    schedule = schedule_of(layout, tokens=8192, tile_out=384, n_programs=132)
    _, _, first, end = schedule.groups.T
    assert torch.equal(first[1:], end[:-1]) and int(end[-1]) == 4096
    assert int((end - first).max()) <= 384 and not (first % CHUNK).any()
    assert sorted(schedule.tasks.order.tolist()) == list(range(64 * len(schedule.groups)))
    assert schedule.tasks.programs == 132


@pytest.mark.parametrize(("n", "tile_k"), [(32, 32), (64, 16), (64, 32), (64, 64), (32, 64)])
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
