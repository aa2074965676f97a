"""The linear bench without a GPU: a run on the CPU, and the GPU's providers with a clock and kernels that stand in."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import pytest
import torch

from tests.support.fake_gpu import A100, H200, KernelRecorder, clock, linear_twin, module_with
from tetris import dispatch
from tetris.autotune.ceilings import Ceilings
from tetris.autotune.timer import Timing
from tetris.bench import linear_bench, linear_operands, linear_peers
from tetris.bench.cases import LinearCase
from tetris.bench.linear_bench import BASELINE, Operands, candidates
from tetris.bench.linear_cases import CASES, QUICK_CASES, Case
from tetris.bench.linear_peers import bsr_metas
from tetris.bench.rows import read_csv
from tetris.kernels.configs import LinearConfig, LinearProblem

CEILINGS = Ceilings(bytes_per_s=1e12, flop_per_s=1e14)


def arguments(tmp_path, **changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    linear_bench.add_arguments(parser)
    values = vars(parser.parse_args([])) | {
        "device": "cpu",
        "quick": True,
        "out": tmp_path,
        "repeats": 3,
        "compile": "never",
    }
    return argparse.Namespace(**values | changes)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands on the CPU, float64 twins for kernels, times from a table."""
    make = Operands.of
    monkeypatch.setattr(Operands, "of", staticmethod(lambda case, device, seed=0: make(case, "cpu")))
    monkeypatch.setattr(linear_bench, "device_info", lambda device: H200)
    monkeypatch.setattr(dispatch, "device_info", lambda device: H200)
    monkeypatch.setattr(linear_bench, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(linear_bench, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(linear_bench, "linear_launcher", lambda kernel: linear_twin)
    monkeypatch.setattr(linear_bench, "time_us", clock({BASELINE: 100.0, "tetris tuned": 20.0, "torch BSR": 80.0}))
    dense_product = lambda operands, meta: lambda: operands.x @ operands.pruned.T  # noqa: E731
    monkeypatch.setattr(linear_bench, "bsr_callable", dense_product)


def test_every_goal_has_a_case_of_its_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and "8192 x 4096-4096 b64x64 27% random" in names
    assert all(case.floor <= case.target for case in CASES if not math.isnan(case.floor + case.target))


def test_a_run_on_the_cpu_is_right_and_written(tmp_path, capsys: pytest.CaptureFixture[str]):
    rows = linear_bench.run(arguments(tmp_path, dtype="float32"))
    assert [row.provider for row in rows] == [BASELINE, "tetris"] * len(QUICK_CASES)
    assert all(row.status == "ok" and row.median_us > 0 and row.error < 1e-5 for row in rows)
    assert rows[0].speedup == 1 and math.isnan(rows[0].roofline_fraction)
    assert [row.median_us for row in read_csv(tmp_path / "linear.csv")] == pytest.approx(
        [row.median_us for row in rows], rel=1e-3
    )
    assert QUICK_CASES[0].name in capsys.readouterr().out
    assert "tetris" in linear_bench.show(rows)
    assert linear_bench.run(arguments(tmp_path, match="no such case")) == []


def test_a_case_that_fails_is_a_row(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def measure(case, args, ceilings):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(linear_bench, "measure", measure)
    rows = linear_bench.run(arguments(tmp_path))
    assert [row.status for row in rows] == ["failed: RuntimeError: out of memory"] * len(QUICK_CASES)


def test_only_the_ends_of_many_tokens_are_checked():
    operands = Operands.of(Case(LinearCase("64-64", 64, 64, 1000, 0.5), (32, 32), dtype="float32"), "cpu")
    product = operands.x.double() @ operands.pruned.double().T
    assert len(operands.rows) == linear_operands.CHECKED_TOKENS and operands.rows[-1] == 999
    torch.testing.assert_close(product[operands.rows], operands.reference)


def test_providers_on_a_gpu_are_compared_and_missing_ones_explained(fake_gpu, tmp_path):
    rows = linear_bench.run(arguments(tmp_path, device="cuda", sweep=3))
    first = {row.provider: row for row in rows if row.case == QUICK_CASES[0].name}
    assert next(iter(first)) == BASELINE and first["tetris tuned"].speedup == 5 and first["torch BSR"].speedup == 1.25
    assert first["tetris tuned"].extra["note"].startswith("{") and "SPLIT_N" in first["torch BSR swept"].extra["note"]
    assert all(row.error < 1e-3 for row in first.values() if row.status == "ok")
    least = CEILINGS.least_us(first["tetris"].flop, first["tetris"].bytes)
    assert first["tetris"].roofline_fraction == pytest.approx(least / 50)
    second = {row.provider: row.status for row in rows if row.case == QUICK_CASES[1].name}
    assert second["torch BSR"] == "skipped: it takes 16 tokens and more"
    assert second["stanford-stk"] == "skipped: not installed"


def test_a_median_far_from_the_fastest_runs_is_marked(fake_gpu, tmp_path, monkeypatch: pytest.MonkeyPatch):
    spread = {"torch BSR": Timing(80.0, 60.0, 400.0, 3)}
    times = lambda runs, **options: {name: spread.get(name, Timing(20.0, 19.5, 90.0, 3)) for name in runs}  # noqa: E731
    monkeypatch.setattr(linear_bench, "time_us", times)
    rows = linear_bench.measure(QUICK_CASES[0], arguments(tmp_path, device="cuda", sweep=1), CEILINGS)
    status = {row.provider: row.status for row in rows}
    assert status["torch BSR"] == "disturbed" and status["tetris"] == status["torch BSR swept"] == "ok"


def test_wrong_products_and_failing_peers_are_not_timed(fake_gpu, tmp_path, monkeypatch: pytest.MonkeyPatch):
    def refuses(operands, meta):
        raise ValueError("no such block")

    monkeypatch.setattr(linear_bench, "bsr_callable", refuses)
    monkeypatch.setattr(linear_bench, "linear_launcher", lambda kernel: lambda *a, **o: 1.01 * linear_twin(*a, **o))
    rows = linear_bench.measure(QUICK_CASES[0], arguments(tmp_path, device="cuda"), CEILINGS)
    status = {row.provider: row.status for row in rows}
    assert status["tetris"] == status["tetris tuned"] == "wrong" and status[BASELINE] == "ok"
    assert status["torch BSR"] == "failed: ValueError: no such block"
    assert all(math.isnan(row.median_us) for row in rows if row.provider != BASELINE)


def test_configurations_that_do_not_fit_are_passed_over(monkeypatch: pytest.MonkeyPatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def too_large():
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(linear_bench, "time_us", clock({"slow": 3.0, "quick": 2.0}, 1.0))
    runs = {"too large": too_large, "slow": lambda: None, "quick": lambda: None}
    assert linear_bench.fastest(runs, "cpu", short=False) == "quick"


@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [(1, {"vector", "split"}), (128, {"hopper", "split", "portable"}), (8192, {"hopper", "portable"})],
)
def test_candidates_are_the_kernels_that_suit_the_tokens(tokens, kernels):
    problem = LinearProblem(tokens, 4096, 4096, (64, 64), "float16", 1100)
    found = candidates(problem, H200)
    assert {config.kernel for config in found} == kernels and len(set(found)) == len(found) > 1
    assert {config.kernel for config in candidates(problem, A100)} == kernels - {"hopper", "split"}


@pytest.mark.filterwarnings("ignore:Sparse")
def test_torch_sees_the_same_weight_as_bsr():
    operands = Operands.of(replace(QUICK_CASES[0], dtype="float32"), "cpu")
    assert torch.equal(linear_peers.bsr_tensor(operands).to_dense(), operands.pruned)
    ragged = Operands.of(Case(LinearCase("100-64", 100, 64, 4, 0.5), (32, 32), dtype="float32"), "cpu")
    with pytest.raises(ValueError, match="whole blocks"):
        linear_peers.bsr_tensor(ragged)


def test_launch_parameters_of_bsr_split_the_tokens_evenly():
    metas = bsr_metas(256, 100)
    assert len({str(meta) for meta in metas}) == len(metas) == 48 and bsr_metas(256, 5) == metas[:5]
    assert all(256 % meta["SPLIT_N"] == 0 for meta in metas) and bsr_metas(100, 1)[0]["SPLIT_N"] == 1


def test_stk_is_asked_for_large_blocks_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_peers.importlib.util, "find_spec", lambda name: object())
    assert linear_peers.stk_status(QUICK_CASES[0]).startswith("skipped: blocks of 128 x 128")
    assert linear_peers.stk_status(CASES[4]) == "skipped: no adapter"


def test_the_hopper_launcher_hands_over_tiles_and_schedule(monkeypatch: pytest.MonkeyPatch):
    from tetris.errors import UnsupportedError
    from tetris.kernels.hopper import linear as hopper

    kernel, name = KernelRecorder(), "tetris.kernels.hopper.linear_device"
    monkeypatch.setitem(sys.modules, name, module_with(name, block_sparse_linear_kernel=kernel))
    monkeypatch.setattr(linear_bench, "device_info", lambda device: H200)
    operands = Operands.of(QUICK_CASES[0], "cpu")
    y = linear_bench.tetris_callable(QUICK_CASES[0], operands, LinearConfig(kernel="hopper", tile_tokens=128))()
    ((grid, given, constants),) = kernel.launches
    assert y.shape == (128, 256) and 1 <= grid[0] <= H200.sm_count
    assert constants["TILE_M"] == 128 and constants["BLOCK_IN"] == 64 and not constants["HAS_BIAS"]
    assert given[0].shape == [128, 256] and given[1].shape == [64 * operands.layout.n_blocks, 64]
    lists = (operands.values, operands.layout.indptr, operands.layout.indices)
    config = LinearConfig(kernel="hopper", tile_tokens=128)
    with pytest.raises(UnsupportedError, match="no permutations"):
        order = torch.arange(256)
        hopper.block_sparse_linear(operands.x, *lists, out_features=256, config=config, input_permutation=order)
    empty = hopper.block_sparse_linear(operands.x[:0], *lists, out_features=256, config=config)
    assert empty.shape == (0, 256) and len(kernel.launches) == 1


def test_cases_that_share_kernels_sweep_the_peer_once():
    jobs = linear_bench.compile_jobs(CASES, 8)
    assert [case for case, _ in jobs] == list(CASES)
    swept = [case for case, sweep in jobs if sweep]
    assert len(swept) < len(CASES) and {case.block for case in swept} == {case.block for case in CASES}
