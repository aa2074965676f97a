"""The Hopper convolution's schedule: every tile once, even ends, spatial order. Pure CPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tetris.errors import TetrisError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.hopper.conv2d import conv2d_schedule
from tetris.kernels.hopper.heuristics import complete_tile
from tetris.kernels.hopper.pairing import pair_block_rows
from tetris.kernels.hopper.schedule import Schedule, make_schedule, one_list, round_robin
from tetris.kernels.hopper.weights import arranged_weights

UNEVEN = [16.0, 9.0, 7.0, 4.0, 2.0, 2.0, 1.0, 1.0]


def loads(schedule: Schedule, costs: list[float]) -> list[float]:
    bounds = schedule.program_ptr.tolist()
    tiles = schedule.order.tolist()
    return [sum(costs[t % len(costs)] for t in tiles[a:b]) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("spatial_tiles", [1, 3, 50, 1000])
@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("maker", [make_schedule, round_robin])
def test_every_tile_runs_once(maker, spatial_tiles, programs):
    rows = len(UNEVEN)
    schedule = maker(UNEVEN if maker is make_schedule else rows, spatial_tiles, programs)
    assert sorted(schedule.order.tolist()) == list(range(rows * spatial_tiles))
    assert schedule.programs == min(programs, rows * spatial_tiles)
    assert schedule.program_ptr[0] == 0 and schedule.program_ptr[-1] == len(schedule.order)
    assert schedule.order.dtype == schedule.program_ptr.dtype == torch.int32


def test_programs_end_together_where_round_robin_does_not():
    costs = [c + 0.35 for c in UNEVEN]
    even = loads(make_schedule(UNEVEN, 196, 132, tile_cost=0.35), costs)
    mean = sum(even) / len(even)
    assert max(even) / mean < 1.03
    naive = loads(round_robin(len(UNEVEN), 196, 128), costs)  # 8 rows, 128 programs: a program keeps its row
    assert max(naive) / (sum(naive) / len(naive)) > 2


def test_makespan_is_the_busiest_program_over_the_mean():
    schedule = make_schedule(UNEVEN, 40, 16, tile_cost=0.0)
    every = loads(schedule, UNEVEN)
    assert schedule.makespan == pytest.approx(max(every) * len(every) / sum(every))


def test_a_program_walks_the_image_in_order_before_the_balanced_rounds():
    rows, spatial, programs, rounds = len(UNEVEN), 400, 16, 2
    schedule = make_schedule(UNEVEN, spatial, programs, balanced_rounds=rounds, tile_cost=0.35)
    tail_from = spatial - -(-rounds * programs // rows)
    bounds, tiles = schedule.program_ptr.tolist(), schedule.order.tolist()
    for a, b in pairwise(bounds):
        places = [t // rows for t in tiles[a:b] if t // rows < tail_from]
        assert places == sorted(places) and places


def test_the_schedule_of_a_layer_weighs_rows_and_halves():
    problem = Conv2dProblem(
        16, 128, 256, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), block=(128, 64), dtype="float16", n_blocks=3
    )
    config = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=4)
    layout = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    schedule = conv2d_schedule(*layout, problem, config, 132, "cpu")
    assert len(schedule.order) == 4 * 49  # two halves of each of two block rows, 7 x 7 tiles
    rows = torch.bincount(schedule.order % 4)
    assert rows.tolist() == [49] * 4


def test_a_schedule_of_an_impossible_tile_is_refused():
    problem = Conv2dProblem(
        16, 64, 64, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 64), dtype="float16", n_blocks=1
    )
    with pytest.raises(TetrisError, match="groups of 8"):
        complete_tile(problem, Conv2dConfig(kernel="hopper", tile_n=4, tile_h=4, tile_w=4))


def test_rows_of_32_are_paired_by_common_inputs():
    rows = [[0, 1, 2], [5], [0, 1, 3], [5, 6], [7]]
    indptr = torch.tensor([0, 3, 4, 7, 9, 10], dtype=torch.int32)
    indices = torch.tensor([column for row in rows for column in row], dtype=torch.int32)
    pairs = pair_block_rows(indptr, indices)
    assert sorted(pairs.rows.tolist()) == [0, 1, 2, 3, 4, 5]  # 5 stands for none
    seen = {}
    for i, (a, b) in enumerate(pairwise(pairs.indptr.tolist())):
        for part in (0, 1):
            row = pairs.rows[2 * i + part].item()
            entries = zip(pairs.indices[a:b].tolist(), pairs.blocks[2 * a : 2 * b].view(-1, 2)[:, part].tolist())
            kept = {column: block for column, block in entries if block < len(indices)}
            assert all(indices[block] == column for column, block in kept.items())
            seen[row] = sorted(kept)
    assert [seen[row] for row in range(5)] == rows and seen[5] == []
    assert {tuple(p) for p in pairs.rows.view(-1, 2).tolist()} == {(1, 3), (0, 2), (4, 5)}


def test_a_schedule_survives_as_tensors():
    layout = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32)
    problem = Conv2dProblem(
        8, 64, 96, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1), block=(32, 32), dtype="float16", n_blocks=3
    )
    schedule = conv2d_schedule(*layout, problem, Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=8), 7, "cpu")
    again = Schedule.from_tensors(schedule.tensors)
    assert torch.equal(again.order, schedule.order) and torch.equal(again.program_ptr, schedule.program_ptr)
    assert torch.equal(again.work, schedule.work) and again.weights is None
    assert torch.equal(again.pairs.blocks, schedule.pairs.blocks) and torch.equal(again.pairs.rows, schedule.pairs.rows)


def test_records_say_what_a_tile_multiplies():
    indptr, indices = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 0, 2, 3])
    schedule = round_robin(rows=6, spatial_tiles=2, programs=5).with_work(indptr, indices, halves=2)
    assert schedule.work.dtype == torch.int32 and torch.equal(schedule.work[:, 0], schedule.order)
    for tile, begin, end, first, pieces, *_ in schedule.work.tolist():
        assert pieces == 1
        block_row = tile % 6 // 2
        assert [begin, end] == indptr[block_row : block_row + 2].tolist()
        assert begin == end or first == indices[begin]


def test_weights_are_arranged_step_by_step():
    values = torch.arange(3 * 9 * 64 * 64).view(3, 9, 64, 64)
    steps = arranged_weights(values, 16)
    assert steps.shape == (12, 9, 64, 16) and steps.is_contiguous()
    for block, step in ((0, 0), (1, 3), (2, 2)):
        assert torch.equal(steps[4 * block + step], values[block, :, :, 16 * step : 16 * step + 16])
    assert arranged_weights(values, 64) is values
    single = arranged_weights(values[:1], 32)
    assert single.is_contiguous() and torch.equal(single[1], values[0, :, :, 32:])
    assert arranged_weights(values[:, :1], 16).is_contiguous()


@pytest.mark.parametrize("tile_k", [32, 64])
def test_a_schedule_keeps_weights_only_where_blocks_take_several_steps(tile_k):
    layout = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    problem = Conv2dProblem(
        8, 128, 128, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 64), dtype="float16", n_blocks=2
    )
    config = Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=4, tile_k=tile_k)
    schedule = conv2d_schedule(*layout, problem, config, 7, "cpu", values=torch.randn(2, 9, 64, 64))
    assert (schedule.weights is None) == (tile_k == 64) and schedule.pairs is None
    again = Schedule.from_tensors(schedule.tensors)
    assert again.pairs is None and (again.weights is None) == (tile_k == 64)


def uneven_schedule(sizes: list[int], batch: int = 1) -> tuple[Schedule, torch.Tensor]:
    """Of a layer whose four block rows keep so many blocks, and its indptr; at batch 1 4 tiles a row."""
    indptr = torch.tensor([0, *sizes]).cumsum(0).int()
    indices = torch.cat([torch.arange(size) for size in sizes]).int()
    problem = Conv2dProblem(
        batch, 512, 256, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 32), dtype="float16", n_blocks=len(indices)
    )
    config = Conv2dConfig(kernel="hopper", tile_n=1, tile_h=8, tile_w=8, input_order="copies")
    return conv2d_schedule(indptr, indices, problem, config, 132, "cpu"), indptr


@pytest.mark.parametrize("last_row", [0, 1])
def test_pieces_of_a_row_cover_it_and_have_places_of_their_own(last_row):
    schedule, indptr = uneven_schedule([14, 3, 1, last_row])
    cut_tiles: dict[tuple[int, int], list[list[int]]] = {}
    for tile, begin, end, first, pieces, counter, place, piece, *_ in schedule.work.tolist():
        assert first < 14 and (begin < end or not last_row)
        cut_tiles.setdefault((tile, pieces), []).append([begin, end, counter, place, piece])
    assert sorted(tile for tile, _ in cut_tiles) == list(range(16))
    places, counters = [], []
    for (tile, pieces), found in cut_tiles.items():
        found.sort()
        assert len(found) == pieces and [piece for *_, piece in found] == list(range(pieces))
        edges = [found[0][0], *(end for _, end, *_ in found)]
        assert [begin for begin, *_ in found] == edges[:-1]
        assert [edges[0], edges[-1]] == indptr[tile % 4 : tile % 4 + 2].tolist()
        if pieces > 1:
            assert len({(counter, place) for _, _, counter, place, _ in found}) == 1
            counters.append(found[0][2])
            places += range(found[0][3], found[0][3] + pieces)
    assert counters and sorted(counters) == list(range(len(schedule.counters)))
    assert sorted(places) == list(range(len(schedule.order) - 16 + len(counters)))
    assert schedule.counters.shape == (len(counters), 2) and not schedule.counters.any()


def test_tiles_of_idle_rows_are_the_last_and_the_others_end_together():
    schedule, _ = uneven_schedule([14, 3, 1, 0], batch=64)
    busy = []
    for program, (begin, end) in enumerate(pairwise(schedule.program_ptr.tolist())):
        middle = int(schedule.ends[program])
        idle = [tile % 4 == 3 for tile in schedule.order[begin:end].tolist()]
        assert idle == [False] * (middle - begin) + [True] * (end - middle) and begin < middle
        busy.append(int((schedule.work[begin:middle, 2] - schedule.work[begin:middle, 1]).sum()))
    assert schedule.fill[1:].tolist() == [192] and max(busy) < 1.1 * sum(busy) / len(busy)


@pytest.mark.parametrize(("sizes", "batch"), [([14, 3, 1, 1], 64), ([14, 3, 0, 0], 64), ([14, 3, 1, 0], 1)])
def test_nothing_is_filled_where_that_does_not_pay(sizes, batch):
    schedule, _ = uneven_schedule(sizes, batch)
    assert len(schedule.fill) == 0 and torch.equal(schedule.ends, schedule.program_ptr[1:])


def test_large_layers_are_not_cut():
    indptr, indices = torch.tensor([0, 8, 9], dtype=torch.int32), torch.arange(9, dtype=torch.int32) % 8
    problem = Conv2dProblem(
        128, 256, 128, 56, 56, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 32), dtype="float16", n_blocks=9
    )
    config = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=8)
    assert len(conv2d_schedule(indptr, indices, problem, config, 132, "cpu").counters) == 0


def test_records_say_where_tiles_begin():
    """Against dividing the tile's number: rows fastest, then columns, lines and images."""
    schedule, _ = uneven_schedule([14, 3, 1, 1], batch=64)
    for tile, *_, row, y, x, image in schedule.work.tolist():
        spatial, expected = divmod(tile, 4)
        assert (row, x, y, image) == (expected, spatial % 2 * 8, spatial // 2 % 2 * 8, spatial // 4)


def test_what_memory_decides_is_taken_from_one_list():
    def made(c_in: int, c_out: int, size: int, **options: bool) -> Schedule:
        rows, columns = c_out // 64, c_in // 16
        indptr, indices = torch.arange(rows + 1, dtype=torch.int32), torch.arange(rows, dtype=torch.int32) % columns
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
        problem = Conv2dProblem(128, c_in, c_out, size, size, *geometry, block=(64, 16), dtype="float16", n_blocks=rows)
        config = Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=16, fetch="sectors")
        return conv2d_schedule(indptr, indices, problem, config, 132, "cpu", **options)

    schedule = made(64, 64, 224)
    assert schedule.takes and schedule.counters.tolist() == [[0]] and schedule.programs == 132
    assert schedule.order.tolist() == list(range(128 // 8 * 224 // 4 * 224 // 16))
    assert schedule.ends.tolist() == [len(schedule.order)] * 132
    assert Schedule.from_tensors(schedule.tensors).takes
    assert not made(64, 64, 224, takes=False).takes and not made(64, 64, 28).takes


def test_one_list_has_the_longest_tile_of_a_place_first():
    schedule = one_list([1.0, 3.0, 2.0], 2, 132)
    assert schedule.order.tolist() == [1, 2, 0, 4, 5, 3] and schedule.programs == 6
