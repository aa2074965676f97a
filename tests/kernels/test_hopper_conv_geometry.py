"""What the Hopper convolution takes, on which tiles, in how much shared memory. Pure CPU."""

from __future__ import annotations

import dataclasses

import pytest

from tetris.errors import ShapeError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo
from tetris.kernels.hopper.geometry import ConvTile
from tetris.kernels.hopper.heuristics import SHARED_BYTES, complete_tile, supports
from tetris.kernels.hopper.tile_choice import estimated_cycles, ranked_configs

H200 = DeviceInfo("H200", (9, 0), 132, "3.7.1")
PROBLEM = Conv2dProblem(
    128, 512, 512, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 64), dtype="float16", n_blocks=16
)


def changed(**fields) -> Conv2dProblem:
    return dataclasses.replace(PROBLEM, **fields)


def test_it_takes_the_flagship_layer():
    assert supports(PROBLEM, H200) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stride": (3, 1)}, "stride"),
        ({"block": (16, 32)}, "multiple of 64"),
        ({"block": (64, 8)}, "32 bytes"),
        ({"block": (64, 48)}, "power of two"),
        ({"c_in": 3}, "16 bytes"),
        ({"c_out": 500}, "16 bytes"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "float32"}, "tf32"),
        ({"height": 1, "padding": (0, 0)}, "no output"),
    ],
)
def test_it_says_why_it_refuses(fields, reason):
    assert reason in supports(changed(**fields), H200)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (DeviceInfo("A100", (8, 0), 108, "3.7.1"), "capability"),
        (DeviceInfo("B200", (10, 0), 148, "3.7.1"), "capability"),
        (DeviceInfo("H200", (9, 0), 132, "3.9.0"), "Triton"),
        (DeviceInfo("H200", (9, 0), 132, "3.5.1"), "Triton"),
    ],
)
def test_it_runs_on_hopper_with_the_triton_it_is_written_for(device, reason):
    assert reason in supports(PROBLEM, device)


def test_float32_runs_where_tf32_is_allowed():
    assert supports(changed(dtype="float32"), H200, allow_tf32=True) is None


def test_pooling_needs_even_rows_in_both_warpgroups():
    config = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=4)
    assert supports(PROBLEM, H200, config, max_pool=True) is None
    odd = dataclasses.replace(config, tile_h=7)
    assert supports(PROBLEM, H200, odd) is None
    assert "pool" in supports(PROBLEM, H200, odd, max_pool=True)


def test_a_halo_tile_serves_all_taps():
    tile = ConvTile((64, 64), tile_n=16, tile_h=4, tile_w=4, tile_k=32)
    assert (tile.input_rows, tile.row_groups, tile.column_groups) == (6, 12, (0, 2, 4))
    assert tile.x_step_bytes == 6 * 6 * 16 * 32 * 2
    assert (tile.halo_box, len(tile.column_loads)) == (2, 2)
    wide = dataclasses.replace(tile, kernel_size=(7, 7))
    assert (wide.halo_box, len(wide.column_loads)) == (2, 4)


def test_stride_two_keeps_even_and_odd_columns_apart():
    tile = ConvTile((64, 64), stride=(2, 2), tile_n=8, tile_h=4, tile_w=4, tile_k=32)
    assert tile.planes == {0: (0, 0), 1: (-1, 0)}  # the middle column reads even pixels, the outer ones odd pixels
    assert (tile.input_rows, tile.row_groups, tile.row_stride) == (9, 4 + 5, 2)
    assert tile.column_groups == (4, 0, 5)
    pointwise = dataclasses.replace(tile, kernel_size=(1, 1), padding=(0, 0))
    assert (pointwise.input_rows, pointwise.row_groups, pointwise.row_step, pointwise.halo_box) == (4, 4, 2, 0)


def test_copies_of_the_tile_join_rows_into_one_instruction():
    tile = ConvTile((64, 64), tile_n=1, tile_h=8, tile_w=8, tile_k=64, copies=True)
    assert tile.x_step_bytes == 3 * 10 * 8 * 64 * 2
    assert (tile.rows_per_accumulator, tile.accumulator_pixels, tile.consumer_rows) == (4, 32, (4, 4))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tile_n": 4}, "groups of 8"),
        ({"tile_h": 16}, "accumulators"),
        ({"tile_k": 48}, "bytes"),
        ({"block": (64, 16)}, "do not divide"),
        ({"block": (96, 64)}, "multiple of 64"),
        ({"w_taps": 4}, "do not divide 9"),
        ({"tile_w": 3}, "powers of two"),
    ],
)
def test_impossible_tiles_are_refused(fields, reason):
    tile = dataclasses.replace(ConvTile((64, 64), tile_n=16, tile_h=4, tile_w=4, tile_k=32), **fields)
    with pytest.raises(ShapeError, match=reason):
        tile.checked()


@pytest.mark.parametrize("block", [(64, 16), (64, 32), (64, 64), (128, 64)])
@pytest.mark.parametrize("shape", [(16, 4, 4), (32, 4, 4), (16, 7, 4), (8, 8, 8), (8, 4, 16)])
def test_filled_in_rings_fit_shared_memory_and_overlap(block, shape):
    n, h, w = shape
    tile = complete_tile(changed(block=block), Conv2dConfig(kernel="hopper", tile_n=n, tile_h=h, tile_w=w))
    assert tile.shared_bytes <= SHARED_BYTES
    assert tile.x_stages >= 2 and tile.w_stages >= 2


def test_tiles_are_ranked_and_all_of_them_run():
    ranked = ranked_configs(PROBLEM, H200)
    assert (ranked[0].tile_n, ranked[0].tile_h, ranked[0].tile_w) == (32, 4, 4)  # fastest when measured, too
    assert all(supports(PROBLEM, H200, config) is None for config in ranked)
    small = ranked_configs(changed(batch=1), H200, max_pool=True)
    assert small and all(config.input_order == "copies" for config in small)
    assert ranked_configs(changed(c_in=3), H200) == []


def test_large_inputs_are_fetched_by_sectors_where_half_of_them_is_pruned():
    large = changed(c_in=64, c_out=64, height=224, width=224, block=(64, 16), n_blocks=1)
    assert ranked_configs(large, H200)[0].fetch == "sectors"
    for other in ({"n_blocks": 3}, {"batch": 8}, {"c_out": 128, "n_blocks": 2}):
        assert ranked_configs(dataclasses.replace(large, **other), H200)[0].fetch == "lines"
    config = dataclasses.replace(ranked_configs(large, H200)[0], tile_h=4, tile_w=4)
    assert "sectors" in (supports(dataclasses.replace(large, stride=(2, 2)), H200, config) or "")


def test_a_larger_batch_is_estimated_to_take_longer():
    config = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=4)
    estimates = [estimated_cycles(p, complete_tile(p, config), H200) for p in (changed(batch=b) for b in (16, 64, 256))]
    assert estimates == sorted(estimates) and estimates[2] > 3 * estimates[1]


def test_bands_cover_the_rows_that_are_read():
    tile = ConvTile((64, 64), tile_n=32, tile_h=4, tile_w=4, tile_k=32)
    assert [(band.row, band.rows, band.readers) for band in tile.bands] == [(0, 1, 1), (1, 1, 1), (2, 1, 2), (3, 1, 2),
                                                                            (4, 1, 1), (5, 1, 1)]  # fmt: skip
    gaps = ConvTile((64, 64), kernel_size=(2, 2), stride=(2, 2), dilation=(2, 2), tile_n=8, tile_h=4, tile_w=4)
    assert [band.row for band in gaps.bands] == [0, 2, 4, 6, 8]  # odd rows are never read
    pointwise = ConvTile((64, 64), kernel_size=(1, 1), padding=(0, 0), tile_n=8, tile_h=8, tile_w=8, w_taps=1)
    assert [(band.row, band.rows) for band in pointwise.bands] == [(0, 4), (4, 4)]  # one band a consumer


@pytest.mark.parametrize(("tile_n", "pools"), [(1, True), (2, False), (4, False)])
def test_columns_pool_where_one_thread_holds_neighbours(tile_n, pools):
    tile = ConvTile((64, 32), tile_n=tile_n, tile_h=8, tile_w=16 // tile_n, tile_k=32, copies=True)
    assert tile.can_pool == pools


@pytest.mark.parametrize("tile_k", [16, 32, 64])
def test_weight_bases_undo_the_swizzle_of_128_byte_rows(tile_k):
    tile = ConvTile((64, 64), tile_k=tile_k)
    stored = {}  # offset -> (output, input channel), as the copy engine stores rows of 128 bytes
    for flat in range(64 * tile_k):
        row, column = divmod(flat, 64)
        offset = row * 64 + (column // 8 ^ row % 8) * 8 + column % 8
        stored[offset] = divmod(flat, tile_k)
    for offset, place in stored.items():
        bases = [basis for bit, basis in enumerate(tile.weight_bases) if offset >> bit & 1]
        found = [0, 0]
        for basis in bases:
            found = [found[0] ^ basis[0], found[1] ^ basis[1]]
        assert tuple(found) == place
    assert tile.weight_rows * 64 == 64 * tile_k
