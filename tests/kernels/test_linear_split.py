"""The split linear kernel against its float64 reference, on a GPU or in the interpreter; its schedule and its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.fake_gpu import A100, H200
from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands, linear_problem
from tetris import reference
from tetris.kernels.configs import LinearConfig
from tetris.kernels.split_schedule import HEAD_FIELDS, make_split_schedule, supports
from tetris.kernels.splitting import PartCosts, choose_parts, cut, makespan
from tetris.tolerances import relative_error, tolerance

CONFIG = LinearConfig(kernel="split", tile_tokens=32, tile_out=64, tile_k=64, num_stages=3)
EVERYTHING = ("bias", "residual", "input", "output")
LONG = LinearCase(200, 4104, (64, 64), (40,), kept=0.5, extras=("bias", "residual"), activation="gelu")


def schedule_of(operands: dict, case: LinearCase, config: LinearConfig, n_programs: int = 132):
    return make_split_schedule(
        operands["indptr"],
        operands["indices"],
        block=case.block,
        tokens=torch.Size(case.tokens).numel(),
        tile_tokens=config.tile_tokens,
        tile_out=config.tile_out,
        n_programs=n_programs,
    )


def check(case: LinearCase, config: LinearConfig, dtype: torch.dtype, device: torch.device, monkeypatch) -> None:
    """Runs it twice with one schedule and compares; fails on NaN and on a store outside the output."""
    from tetris.kernels.linear_split import block_sparse_linear

    operands = linear_operands(case, dtype, device)
    schedule = schedule_of(operands, case, config)
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
        (LONG, CONFIG),
        (replace(LONG, extras=EVERYTHING, activation="silu", tokens=(3, 5)), replace(CONFIG, tile_tokens=16)),
        (replace(LONG, block=(128, 64), extras=()), replace(CONFIG, tile_k=32)),
        (replace(LONG, block=(32, 32), extras=("output",)), replace(CONFIG, tile_out=32, tile_k=32)),
        (replace(LONG, extras=()), replace(CONFIG, tile_k=128)),  # two blocks a step, some parts odd
        (replace(LONG, block=(64, 16), extras=()), replace(CONFIG, tile_k=64)),
        (LinearCase(200, 136, (64, 64), (19,), extras=EVERYTHING, activation="relu"), CONFIG),
        (LinearCase(64, 64, (64, 64), (0,)), CONFIG),
        (replace(LONG, weight_dtype="int8"), CONFIG),
        (replace(LONG, weight_dtype="float8_e4m3fn", extras=("bias",)), CONFIG),
    ],
    ids=lambda value: str(value) if isinstance(value, LinearCase) else "",
)
def test_matches_the_reference(case, config, device, monkeypatch):
    check(case, config, torch.float32, device, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 128, 300])
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 16), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sweep_on_the_gpu(block, tokens, dtype, device, monkeypatch):
    case = LinearCase(456, 8200, block, (tokens,), kept=0.3, activation="silu", extras=("bias", "residual"))
    base = replace(CONFIG, tile_out=min(block[0], 64), tile_k=min(block[1], 64), num_stages=8)
    for tile_tokens in (32, 64, 128):
        check(case, replace(base, tile_tokens=tile_tokens), dtype, device, monkeypatch)
    check(case, replace(base, tile_k=2 * block[1], num_stages=5), dtype, device, monkeypatch)


@pytest.mark.gpu
def test_is_the_same_every_time(device):
    """No race: bit-identical results over many runs, most of them of cut rows."""
    from tetris.kernels.linear_split import block_sparse_linear

    case = LinearCase(4096, 16384, (64, 64), (128,), kept=0.27)
    operands = linear_operands(case, torch.float16, device)
    config = replace(CONFIG, tile_tokens=128)
    schedule = schedule_of(operands, case, config)
    assert schedule.counters.numel() > 100
    first = block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
    for _ in range(200):
        assert torch.equal(first, block_sparse_linear(**operands, config=config, schedule=schedule.tensors))


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(device):
    """The counters are back at zero after every replay."""
    from tetris.kernels.linear_split import block_sparse_linear

    operands = linear_operands(replace(LONG, tokens=(100,)), torch.float16, device)
    config = replace(CONFIG, tile_tokens=64)
    schedule = schedule_of(operands, replace(LONG, tokens=(100,)), config)
    eager = block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
    for _ in range(5):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, eager) and schedule.counters.count_nonzero() == 0


def test_parts_cover_every_block_once():
    operands = linear_operands(LONG, torch.float16, torch.device("cpu"))
    schedule = schedule_of(operands, LONG, CONFIG)
    seen, places = [], []
    for tile, first, count, parts, first_place, place, *_ in schedule.parts[:, :HEAD_FIELDS].tolist():
        assert operands["indptr"][tile] <= first and first + count <= operands["indptr"][tile + 1]
        seen += range(first, first + count)
        if parts > 1:
            assert first_place <= place < first_place + parts
            places.append(place)
    assert sorted(seen) == list(range(len(operands["indices"])))
    assert sorted(places) == list(range(schedule.counters.shape[1]))
    for record in schedule.parts.tolist():
        first, count = record[1:3]
        columns = operands["indices"][first : first + count] * LONG.block[1]
        assert record[HEAD_FIELDS : HEAD_FIELDS + count] == columns.tolist()
        assert all(column >= LONG.in_features for column in record[HEAD_FIELDS + count :]), "TMA reads zeros there"


def test_parts_are_chosen_by_what_they_cost():
    free, dear = PartCosts(0, 0, 0), PartCosts(10, 50, 50)
    assert choose_parts([64.0], [64], 1, 8, free) == [8]
    assert choose_parts([64.0], [5], 1, 8, free) == [5], "no part without a block"
    assert choose_parts([64.0], [64], 1, 8, dear) == [1]
    assert choose_parts([8.0] * 8, [8] * 8, 1, 8, PartCosts(1, 1, 1)) == [1] * 8
    few = choose_parts([100.0] + [10.0] * 10, [100] + [10] * 10, 1, 8, PartCosts(1, 1, 0.5))
    assert few[0] > 2 and few[1:] == [1] * 10


def test_even_parts_and_their_makespan():
    assert cut(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert makespan([4.0, 3.0, 3.0, 2.0], 2) == 6.0


@pytest.mark.parametrize(
    ("change", "device", "config", "reason"),
    [
        ({}, A100, CONFIG, "descriptors"),
        ({"dtype": "float32"}, H200, CONFIG, "float32"),
        ({"in_features": 4100}, H200, CONFIG, "multiples of 8"),
        ({"block": (48, 64)}, H200, CONFIG, "divide"),
        ({}, H200, replace(CONFIG, tile_tokens=24), "powers of two"),
        ({"block": (64, 96)}, H200, replace(CONFIG, tile_k=128), "whole blocks"),
        ({"block": (64, 16)}, H200, replace(CONFIG, tile_k=256), "8 blocks"),
    ],
)
def test_says_why_it_does_not_support(change, device, config, reason):
    problem = linear_problem(LONG, linear_operands(LONG, torch.float16, torch.device("cpu")))
    assert supports(problem, H200, CONFIG) is None
    assert reason in (supports(replace(problem, **change), device, config) or "")
