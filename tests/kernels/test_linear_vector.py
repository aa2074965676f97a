"""The one-token kernel against its float64 reference, on a GPU or in the interpreter; its schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import LinearConfig
from tetris.kernels.vector_schedule import MOST_PARTS, make_vector_schedule, parts_of_rows
from tetris.tolerances import relative_error, tolerance

CONFIG = LinearConfig(kernel="vector", tile_tokens=1, tile_out=16, tile_k=64, num_stages=1)
PIPELINED = replace(CONFIG, tile_out=0, tile_k=0, num_stages=3)
ONE = LinearCase(tokens=(1,))
EVERYTHING = ("bias", "residual", "input", "output")
UNEVEN = LinearCase(200, 4104, (64, 64), (1,), kept=0.3, extras=("bias", "residual"), activation="gelu")


def uneven_operands(case: LinearCase, dtype: torch.dtype, device: torch.device) -> dict:
    """Operands whose first block row takes the blocks of all others but one each."""
    operands = linear_operands(case, dtype, device)
    pointers = operands["indptr"]
    rows, total = len(pointers) - 1, int(pointers[-1])
    long = min(total - rows + 1, -(-case.in_features // case.block[1]))
    counts = torch.full((rows,), (total - long) // (rows - 1), dtype=torch.int32)
    counts[0] = long
    kept = int(counts.sum())
    columns = torch.cat([torch.arange(int(count), dtype=torch.int32) for count in counts])
    operands["indptr"] = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()]).to(device)
    operands["indices"] = columns.to(device)
    operands["values"] = operands["values"][:kept].contiguous()
    return operands


def check(operands: dict, config: LinearConfig, dtype: torch.dtype, monkeypatch, sm_count: int = 132) -> None:
    """Runs it twice with one schedule and compares; fails on NaN and on a store outside the output."""
    from tetris.kernels.linear_vector import block_sparse_linear

    schedule = make_vector_schedule(operands["indptr"], tuple(operands["values"].shape[-2:]), config, sm_count)
    results = []
    for _ in range(2):
        with nan_outputs(monkeypatch):
            results.append(block_sparse_linear(**operands, config=config, schedule=schedule.tensors))
    assert torch.equal(*results) and schedule.counters.count_nonzero() == 0
    assert results[0].dtype == dtype and results[0].is_contiguous()
    assert relative_error(results[0], reference.block_sparse_linear(**operands)) <= tolerance(dtype)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (ONE, CONFIG),
        (ONE, PIPELINED),
        (LinearCase(tokens=()), CONFIG),
        (replace(ONE, out_features=72, in_features=40, extras=EVERYTHING, activation="silu"), CONFIG),
        (replace(ONE, in_features=55, pitch=3), CONFIG),
        (replace(ONE, out_features=50, in_features=20, block=(25, 10)), CONFIG),
        (replace(ONE, out_features=10, in_features=500, block=(5, 250)), CONFIG),
        (replace(ONE, weight_dtype="int8", extras=("bias",)), CONFIG),
    ],
    ids=lambda value: str(value) if isinstance(value, LinearCase) else "",
)
def test_matches_the_reference(case, config, device, monkeypatch):
    check(linear_operands(case, torch.float32, device), config, torch.float32, monkeypatch)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("extras", [("bias", "residual"), EVERYTHING], ids=str)
def test_long_rows_are_cut(extras, device, monkeypatch):
    operands = uneven_operands(replace(UNEVEN, extras=extras), torch.float32, device)
    schedule = make_vector_schedule(operands["indptr"], (64, 64), CONFIG, 132)
    assert int(schedule.parts[:, 3].max()) > 4
    check(operands, CONFIG, torch.float32, monkeypatch)


@pytest.mark.usefixtures("triton_kernels")
def test_no_token(device):
    from tetris.kernels.linear_vector import block_sparse_linear

    operands = linear_operands(LinearCase(tokens=(0,)), torch.float32, device)
    assert block_sparse_linear(**operands, config=CONFIG).shape[0] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 16), (128, 128), (100, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sweep_on_the_gpu(block, dtype, device, monkeypatch):
    case = LinearCase(456, 4104, block, (1,), kept=0.3, activation="silu", extras=("bias", "residual"))
    for operands in (linear_operands(case, dtype, device), uneven_operands(case, dtype, device)):
        for changes in ({}, {"tile_out": 32, "tile_k": 256, "num_stages": 3}, {"tile_k": 1024, "num_warps": 8}):
            check(operands, replace(CONFIG, **changes), dtype, monkeypatch)


@pytest.mark.gpu
def test_is_the_same_every_time(device):
    """No race: bit-identical results over many runs of cut rows."""
    from tetris.kernels.linear_vector import block_sparse_linear

    operands = uneven_operands(UNEVEN, torch.float16, device)
    schedule = make_vector_schedule(operands["indptr"], (64, 64), CONFIG, 132)
    first = block_sparse_linear(**operands, config=CONFIG, schedule=schedule.tensors)
    for _ in range(200):
        assert torch.equal(first, block_sparse_linear(**operands, config=CONFIG, schedule=schedule.tensors))


def test_rows_are_cut_where_one_is_far_longer():
    assert parts_of_rows([17] * 64, 4, 4, 8, 1056) == [1] * 64, "even rows"
    assert parts_of_rows([15, *[3] * 63], 4, 4, 8, 1056) == [1] * 64, "uneven, but short"
    assert parts_of_rows([64, *[4] * 63], 4, 4, 8, 1056) == [8] + [1] * 63
    assert parts_of_rows([1000, *[4] * 63], 4, 4, 8, 1056)[0] == MOST_PARTS


def test_there_are_no_more_parts_than_run_at_once():
    counts = [64] * 20 + [8] * 204
    parts = parts_of_rows(counts, 4, 4, 8, 1056)
    assert 896 < 4 * sum(parts) <= 1056 and parts[-1] == 1
    assert parts_of_rows(counts, 4, 4, 8, 528) == [1] * 224, "whole rows are too many as it is"


def test_parts_cover_every_block_once():
    operands = uneven_operands(UNEVEN, torch.float16, torch.device("cpu"))
    schedule = make_vector_schedule(operands["indptr"], (64, 64), CONFIG, 132)
    seen, places = [], []
    for tile, first, count, parts, first_place, place, *_ in schedule.parts.tolist():
        row = tile // 4
        assert operands["indptr"][row] <= first and first + count <= operands["indptr"][row + 1]
        seen += [(tile % 4, block) for block in range(first, first + count)]
        if parts > 1:
            assert first_place <= place < first_place + parts
            places.append(place)
    blocks = len(operands["indices"])
    assert sorted(seen) == [(piece, block) for piece in range(4) for block in range(blocks)]
    assert sorted(places) == list(range(len(schedule.counters)))
