"""The convolution benches without a GPU: cases, operands, row building. The clock and the kernel are stand-ins."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import pytest
import torch

from tests.support.fake_gpu import H200, KernelRecorder, clock, conv2d_twin, module_with
from tetris.autotune.ceilings import Ceilings
from tetris.bench import conv_bench, conv_chain, conv_figures_bench, conv_measure, conv_permuted
from tetris.bench.cases import ConvCase
from tetris.bench.conv_cases import CASES, QUICK_CASES, Case, vgg16_cases
from tetris.bench.conv_measure import (
    BASELINE,
    SHORT_BATCH,
    Operands,
    candidates,
    case_layout,
    case_problem,
    least_bytes,
)
from tetris.bench.rows import read_csv
from tetris.kernels.hopper import conv2d as hopper_conv2d

CEILINGS = Ceilings(bytes_per_s=1e12, flop_per_s=1e14)
TIMES = {BASELINE: 100.0, "torch.compile": 100.0, "tetris tuned": 25.0, "0": 40.0, "1": 30.0}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands on the CPU, float64 twins for kernels, times from a table."""
    make = Operands.of
    monkeypatch.setattr(Operands, "of", staticmethod(lambda case, device, seed=0: make(case, "cpu", seed)))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restored after the test
    for module in (conv_measure, conv_chain):
        monkeypatch.setattr(module, "time_us", clock(TIMES))
        monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(conv_measure, "device_info", lambda device: H200)
    monkeypatch.setattr(conv_measure, "block_sparse_conv2d", conv2d_twin)
    monkeypatch.setattr(conv_bench, "measure_ceilings", lambda device, dtype: CEILINGS)
    for module in (conv_bench, conv_figures_bench):
        monkeypatch.setattr(module, "compile_all", lambda cases, most, more=(): None)


def options(tmp_path, **changes) -> argparse.Namespace:
    defaults = {"device": "cuda", "quick": True, "match": "", "candidates": 2, "repeats": 1, "no_chain": False}
    defaults |= {"compile": "first"}
    return argparse.Namespace(**defaults | {"out": tmp_path} | changes)


def test_every_goal_has_a_case_of_its_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "512-512@28 n128 b64x64 25% random"
    assert all(case.floor <= case.target for case in CASES if not math.isnan(case.floor))
    assert {case.dtype for case in CASES} == {"float16", "bfloat16", "float32"}
    assert "bias relu pool" in QUICK_CASES[1].name


def test_vgg16_keeps_its_first_layer_dense_and_pools_five_times():
    cases = vgg16_cases(4, (128, 64))
    assert len(cases) == 13 and sum(case.pool for case in cases) == 5 and all(case.fused for case in cases)
    assert cases[0].layer.kept == 1.0 and cases[0].block == (64, 16) and cases[0].layout == "random"
    assert cases[1].block == (64, 64) and cases[-1].block == (128, 64)
    assert {case.layer.batch for case in cases} == {4}


def test_layouts_keep_the_asked_fraction():
    case = CASES[0]
    layout = case_layout(case)
    assert layout.kept_fraction == pytest.approx(case.layer.kept, abs=0.5 / 64)
    single = replace(QUICK_CASES[0], layout="reordered")
    assert torch.equal(case_layout(single).indices, case_layout(QUICK_CASES[0]).indices)  # one block row: random
    assert case_problem(vgg16_cases(1, (64, 32))[0], 4).c_in == 8


def test_candidates_start_with_the_analytic_choice(fake_gpu):
    from tetris.kernels.conv2d_paths import choose_conv2d_config

    for case in QUICK_CASES:
        found = candidates(case, 3)
        problem = case_problem(case, case_layout(case).n_blocks)
        assert found[0] == choose_conv2d_config(problem, H200, max_pool=case.pool)
        most = 9 if case.layer.batch <= SHORT_BATCH else 3
        assert 1 <= len(found) <= most and len(set(found)) == len(found)


def test_least_bytes_counts_everything_once():
    layer = ConvCase("tiny", 32, 32, 4, 4, batch=2, kept=1.0)
    case = Case(layer, (32, 32))
    pixels = 2 * 4 * 4 * 32
    assert least_bytes(case, case_layout(case)) == 2 * (2 * pixels + 32 * 32 * 9)
    assert least_bytes(replace(case, pool=True), case_layout(case)) == 2 * (pixels + pixels / 4 + 32 * 32 * 9)


def test_rows_of_a_case_are_checked_and_compared(fake_gpu):
    rows = {row.provider: row for row in conv_measure.measure(QUICK_CASES[1], CEILINGS, most=2)}
    assert list(rows) == [BASELINE, "tetris", "tetris tuned"]
    assert rows["tetris"].speedup == pytest.approx(2.5) and rows["tetris tuned"].speedup == pytest.approx(100 / 30)
    assert rows["tetris"].error < 1e-3 and all(row.status == "ok" for row in rows.values())
    assert rows["tetris"].roofline_fraction == pytest.approx(
        CEILINGS.least_us(rows["tetris"].flop, rows["tetris"].bytes) / 40
    )
    assert rows["tetris tuned"].extra["note"] != rows["tetris"].extra["note"] != ""
    assert rows["tetris"].extra["ideal"] <= 1 / rows["tetris"].extra["kept"]


def test_a_wrong_result_is_not_timed(fake_gpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conv_measure, "block_sparse_conv2d", lambda *a, **o: 1.01 * conv2d_twin(*a, **o))
    rows = conv_measure.measure(QUICK_CASES[0], CEILINGS, most=1)
    assert [row.status for row in rows] == ["ok", "wrong", "wrong"]
    assert rows[1].error == pytest.approx(0.01, rel=0.2) and math.isnan(rows[1].median_us)


def test_a_run_writes_its_rows_as_they_come(fake_gpu, tmp_path, capsys: pytest.CaptureFixture[str]):
    rows = conv_bench.run(options(tmp_path))
    assert len(rows) == 6 and [row.case for row in rows[::3]] == [case.name for case in QUICK_CASES]
    assert [row.provider for row in read_csv(tmp_path / "conv.csv")] == [row.provider for row in rows]
    assert "3.33" in capsys.readouterr().out
    shown = conv_bench.show(rows)
    assert "tetris tuned" in shown and "ideal" in shown


def test_a_run_of_some_cases_keeps_the_others(fake_gpu, tmp_path):
    before = conv_bench.run(options(tmp_path))
    after = conv_bench.run(options(tmp_path, match=QUICK_CASES[1].name, candidates=1))
    assert [(row.case, row.provider) for row in after] == [(row.case, row.provider) for row in before]
    assert [row.speedup for row in after[:3]] == pytest.approx([row.speedup for row in before[:3]], rel=1e-5)
    assert after[5].speedup == pytest.approx(2.5)  # the only candidate of this run, not the better second one
    assert len(conv_bench.run(options(tmp_path, match="no such case"))) == len(before)
    assert len(read_csv(tmp_path / "conv.csv")) == len(before)


def test_benches_say_that_they_need_a_gpu(tmp_path):
    for bench in (conv_bench, conv_figures_bench):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = argparse.Namespace(**vars(parser.parse_args([])), device="cpu", quick=False, out=tmp_path)
        (row,) = bench.run(args)
        assert row.status.startswith("skipped") and math.isnan(row.median_us)


def test_ceilings_of_float32_are_those_of_tf32(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        conv_bench, "measure_ceilings", lambda *a: seen.append((*a, torch.backends.cuda.matmul.allow_tf32))
    )
    before = torch.backends.cuda.matmul.allow_tf32
    conv_bench.conv_ceilings("float32")
    assert seen == [("cuda", torch.float32, True)] and torch.backends.cuda.matmul.allow_tf32 == before


def test_the_chain_is_the_dense_network_on_kept_blocks(fake_gpu, monkeypatch: pytest.MonkeyPatch):
    first = Case(ConvCase("a", 3, 64, 16, 16, batch=8, kept=1.0), (64, 16), fused=True, pool=True)
    second = Case(ConvCase("b", 64, 64, 8, 8, batch=8, kept=0.5), (64, 32), fused=True)
    monkeypatch.setattr(conv_chain, "vgg16_cases", lambda batch, block: (first, second))
    dense, sparse = conv_chain.chain_rows(2, 1, CEILINGS, batches=(8,))
    assert dense.provider == "torch.compile" and sparse.provider == "tetris tuned"
    assert sparse.status == "ok" and sparse.error < conv_chain.CHAIN_ERROR and sparse.speedup == 4.0
    layers = [Operands.of(case, "cpu", seed) for seed, case in enumerate((first, second))]
    assert sparse.flop == sum(layer.case.layer.flop(layer.layout.kept_fraction) for layer in layers)
    chosen = conv_chain.best_configs((first, second), layers, 2)
    found = [candidates(case, 2) for case in (first, second)]
    assert chosen == [each[min(1, len(each) - 1)] for each in found]  # "1" is the faster one


def test_permuted_stores_are_compared_with_the_permute_kernel(fake_gpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conv_permuted, "CASE", QUICK_CASES[0])
    monkeypatch.setattr(conv_permuted, "time_us", clock(TIMES | {"tetris, then the permute kernel": 75.0}))
    monkeypatch.setattr(conv_permuted, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(conv_permuted, "permute_channels", lambda x, order, dim: x.index_select(dim, order))
    rows = conv_permuted.permuted_rows(1)
    assert [row.status for row in rows] == ["ok"] * 4 and [row.speedup for row in rows] == [1.5, 1.0, 1.5, 1.5]
    assert [config.output_group for _, config in conv_permuted.permuted_configs()] == [8, 16]


def test_figures_cover_blocks_and_sparsities():
    cases = conv_figures_bench.figure_1a()
    assert len(cases) == len(conv_figures_bench.BLOCKS) * len(conv_figures_bench.SPARSITIES)
    assert {case.layout for case in cases if case.layer.kept == 1} == {"random"}
    layers = conv_figures_bench.figure_7(batch=2)
    assert all(c.layer.c_in >= c.block[1] and c.layer.c_out >= c.block[0] and c.layer.batch == 2 for c in layers)
    assert {case.layer.name for case in layers}.isdisjoint({"conv1_1"}) and len({c.layer.name for c in layers}) == 12


def test_figures_are_drawn_from_what_was_measured(fake_gpu, monkeypatch: pytest.MonkeyPatch, tmp_path):
    cases = [replace(QUICK_CASES[0], layer=replace(QUICK_CASES[0].layer, kept=kept)) for kept in (1.0, 0.5)]
    monkeypatch.setattr(conv_figures_bench, "figure_1a", lambda: cases)
    monkeypatch.setattr(conv_figures_bench, "figure_7", lambda: cases[:1])
    rows = conv_figures_bench.run(options(tmp_path, candidates=1))
    assert [row.extra["figure"] for row in rows[::3]] == ["figure 1a", "figure 1a", "figure 7"]
    for name in ("conv_figure_1a.png", "conv_figure_7.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert BASELINE not in conv_figures_bench.show(rows)


class InlinePool:
    """A process pool without processes."""

    def __init__(self, *sizes, **options) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None: ...

    map = staticmethod(map)


def test_all_candidates_are_compiled_ahead_with_their_own_tiles(fake_gpu, monkeypatch: pytest.MonkeyPatch):
    kernel, threads = KernelRecorder(), torch.get_num_threads()
    name = "tetris.kernels.hopper.conv2d_device"
    monkeypatch.setitem(sys.modules, name, module_with(name, conv2d_kernel=kernel))
    monkeypatch.setattr(conv_measure, "ProcessPoolExecutor", InlinePool)
    conv_measure.compile_all(QUICK_CASES, 2)
    torch.set_num_threads(threads)
    wanted = [(case, config) for case in QUICK_CASES for config in candidates(case, 2)]
    assert len(kernel.launches) == len(wanted)
    for (case, config), (_, _, constants) in zip(wanted, kernel.launches):
        assert constants["POOL"] == case.pool and constants["HAS_BIAS"] and constants["ACTIVATION"] == "relu"
        assert (constants["T"].tile_h, constants["T"].tile_w) == (config.tile_h, config.tile_w)


def test_a_launch_covers_all_tiles_and_refuses_what_it_cannot(monkeypatch: pytest.MonkeyPatch):
    from tetris.errors import ShapeError, UnsupportedError

    kernel, name = KernelRecorder(), "tetris.kernels.hopper.conv2d_device"
    monkeypatch.setitem(sys.modules, name, module_with(name, conv2d_kernel=kernel))
    monkeypatch.setattr(hopper_conv2d, "device_info", lambda device: H200)
    monkeypatch.setattr(conv_measure, "device_info", lambda device: H200)
    case = QUICK_CASES[1]
    operands, config = Operands.of(case, "cpu"), candidates(case, 1)[0]
    y = operands.tetris(config)()
    assert y.shape == (16, 128, 6, 6) and y.is_contiguous(memory_format=torch.channels_last)
    (grid, arguments, constants) = kernel.launches[0]
    assert 1 <= grid[0] <= H200.sm_count and constants["POOL"] and arguments[-2:] == (128, 0)
    lists = (operands.values, operands.layout.indptr, operands.layout.indices)
    geometry = {"c_out": 128, "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    with pytest.raises(UnsupportedError, match="channels_last"):
        hopper_conv2d.block_sparse_conv2d(operands.x.contiguous(), *lists, **geometry, config=config)
    with pytest.raises(UnsupportedError, match="in groups only"):
        order = torch.arange(64)
        hopper_conv2d.block_sparse_conv2d(operands.x, *lists, **geometry, config=config, input_permutation=order)
    other = hopper_conv2d.conv2d_schedule(
        *lists[1:], replace(case_problem(case, 16), batch=4096), config, 132, operands.x.device
    )
    with pytest.raises(ShapeError, match="wanted a schedule of"):
        hopper_conv2d.block_sparse_conv2d(operands.x, *lists, **geometry, config=config, schedule=other)
