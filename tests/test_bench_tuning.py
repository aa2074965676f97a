"""The tuning bench with the CPU in the GPU's place: layers ignore their configuration, everything else is real."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.fake_gpu import H200
from tetris.autotune import tune_problems
from tetris.autotune.candidates import candidates
from tetris.autotune.compile_ahead import Compiled
from tetris.autotune.problems import pools
from tetris.autotune.store import TuningStore
from tetris.bench import tuning_bench, tuning_cases, tuning_suite
from tetris.bench.rows import Row, read_csv, write_csv
from tetris.bench.tuning_cases import FULL, SUITES
from tetris.layers import BlockSparseLinear

CASES = {case.name: case for suite in FULL for case in SUITES[suite]}


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_suite, "device_info", lambda device: H200)
    monkeypatch.setattr(tuning_suite, "DTYPE", torch.float32)
    monkeypatch.setattr(tuning_bench, "WITHOUT_CONFIGURATIONS", ())
    options = {"suite": [("small", 3)], "quick": True, "workers": 0, "layers": None, "log": False}
    options |= {"keep": False, "cold": []}
    return Namespace(device="cpu", out=tmp_path, stage="both", check=True, compile_seconds=math.inf, **options)


def test_every_layer_and_suite_gets_its_rows_and_the_choices_are_stored(args: Namespace, tmp_path: Path) -> None:
    rows = tuning_bench.run(args)
    by_case = {(row.case, row.provider): row for row in rows}
    assert {provider for case, provider in by_case if case == "small conv"} == {"analytic", "default", "tuned"}
    for name in ("small conv", "small fc", "small"):
        default, tuned = by_case[name, "default"], by_case[name, "tuned"]
        assert tuned.extra["fraction"] == 1 and default.extra["fraction"] == tuned.median_us / default.median_us <= 1
        assert 0 < tuned.extra["random_fraction"] <= 1 and 0 < default.extra["random_fraction"] <= 1
    search = next(row for row in rows if row.provider == "search")
    assert search.extra["layers"] == 2 and search.extra["tried"] == 6 and search.extra["seconds"] >= 0
    assert (
        search.extra["ruled_out"]
        == sum(row.extra["ruled_out"] for row in rows if row.provider == "tuned" and "ruled_out" in row.extra)
        > 6
    )
    assert {"prepare_seconds", "race_seconds", "final_seconds", "layers_seconds"} <= set(search.extra)
    assert [row.case for row in read_csv(tmp_path / "tuning.csv")] == [row.case for row in rows]
    assert len(TuningStore().mine) == 2
    assert "fraction" in tuning_bench.show(rows)


def test_failures_are_listed_with_their_reason(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: torch.nn.Module, x: torch.Tensor, residual: None) -> torch.Tensor:
        if '"num_stages":' in self.config:
            raise RuntimeError("too many resources requested\nfor launch")
        return x

    monkeypatch.setattr(BlockSparseLinear, "_forward", forward)
    args.layers = "fc"
    rows = tuning_bench.run(args)
    assert rows[0].status == "failed: nothing ran" and rows[0].extra["failed"] == 3
    failures = read_csv(tmp_path / "tuning_failures.csv")
    assert len(failures) == 3 and failures[0].status == "failed: RuntimeError: too many resources requested"
    assert "num_stages" in failures[0].extra["config"]


def test_what_failed_to_compile_before_is_not_measured(args: Namespace, tmp_path: Path) -> None:
    args.layers, (case,) = "fc", [case for case in SUITES["small"] if case.layer.name == "fc"]
    tried = candidates(case.wanted("cpu", torch.float32).problem, H200, budget=3)
    failure = Row("tuning", case.name, "failure", status="failed: hangs", extra={"config": tried[1].to_key()})
    write_csv(tmp_path / "tuning_failures.csv", [failure])
    args.stage = "measure"
    rows = tuning_bench.run(args)
    assert rows[0].extra["tried"] == 2 and rows[0].extra["failed"] == 1
    assert read_csv(tmp_path / "tuning_failures.csv")[0].extra["config"] == tried[1].to_key()


def test_compiling_alone_lists_what_fails(args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, batches, device, team, workers, server) -> None:
            self.count = sum(map(len, batches))

        def results(self, on_progress, seconds, meanwhile) -> list[Compiled]:
            return [Compiled("too large" if index == 0 else "", 1.5) for index in range(self.count)]

        def close(self) -> None: ...

    monkeypatch.setattr(tune_problems, "CompilePool", Pool)
    args.stage, args.workers = "compile", 1
    (row,) = tuning_bench.run(args)
    assert row.extra["tried"] == 6 and row.extra["compile_seconds"] == 9 and row.extra["failed"] == 1
    assert [failure.status for failure in read_csv(tmp_path / "tuning_failures.csv")] == ["failed: too large"]


def test_what_was_measured_of_other_suites_is_kept_when_asked(args: Namespace, tmp_path: Path) -> None:
    others = [Row("tuning", "resnet50", "search"), Row("tuning", "resnet50 b128 1x1", "tuned", 5.0)]
    write_csv(
        tmp_path / "tuning.csv", [*others, Row("tuning", "small fc", "tuned", 7.0), Row("tuning", "small", "search")]
    )
    args.keep = True
    rows = tuning_bench.run(args)
    assert rows[:2] == others and [row.case for row in rows].count("small fc") == 3
    assert [row.case for row in read_csv(tmp_path / "tuning.csv")] == [row.case for row in rows]
    args.keep = False
    assert {row.case for row in tuning_bench.run(args)} == {"small", "small conv", "small fc"}


def test_a_cold_search_compiles_into_an_empty_cache(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "filled"))
    monkeypatch.setattr(tune_problems.Search, "compile", lambda *arguments: seen.append(os.environ["TRITON_CACHE_DIR"]))
    (case,) = [case for case in SUITES["small"] if case.layer.name == "fc"]
    tried = candidates(case.wanted("cpu", torch.float32).problem, H200, budget=3)
    late = Row(
        "tuning", case.name, "failure", status="failed: not compiled in time", extra={"config": tried[1].to_key()}
    )
    write_csv(tmp_path / "tuning_failures.csv", [late])
    args.stage, args.cold = "measure", ["small"]
    rows = tuning_bench.run(args)
    assert not any(row.extra.get("late") for row in rows), "what an earlier run could not compile this one does"
    assert seen[0] != str(tmp_path / "filled") == seen[1], "the check finds what there is"
    assert not Path(seen[0]).exists()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "filled")
    assert next(row for row in rows if row.provider == "search").extra["cache"] == "empty"


def test_the_log_tells_what_every_compilation_took(args: Namespace, tmp_path: Path) -> None:
    args.stage, args.workers, args.log, args.check = "compile", 1, True, False
    tuning_bench.run(args)
    rows = read_csv(tmp_path / "tuning_jobs.csv")
    assert len(rows) == 6 and {row.status for row in rows} == {"ok"}
    for row in rows:
        took = row.extra
        assert took["started"] < took["ready"] <= took["began"] and took["worker"] == 0
        assert 0 < took["layer"] + took["launch"] <= took["seconds"] and took["cpu"] >= 0 == took["kernels"]


def test_the_cpu_has_nothing_to_tune(tmp_path: Path) -> None:
    (row,) = tuning_bench.run(Namespace(device="cpu", out=tmp_path, suite=None, quick=True))
    assert row.status.startswith("skipped")


def test_layouts_are_kept_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_BENCH_LAYOUTS", str(tmp_path / "layouts"))
    case = replace(CASES["vgg16 b8 fc8"], layer=replace(CASES["vgg16 b8 fc8"].layer, kept=0.31))
    first = case.wanted("cpu", torch.float32).layer
    (file,) = (tmp_path / "layouts").iterdir()
    tuning_cases._layout.cache_clear()
    monkeypatch.setattr(tuning_cases, "_made_layout", lambda *arguments: pytest.fail("it was there"))
    again = case.wanted("cpu", torch.float32).layer
    assert torch.equal(first.indptr, again.indptr) and torch.equal(first.indices, again.indices)
    assert "reordered-1000x4096-64x64-0.31" in file.name and again.indptr.dtype == torch.int32


def test_suites_are_the_targets() -> None:
    names = {case.suite for case in CASES.values()}
    assert {"vgg16 b128", "vgg16 b32", "vgg16 b8", "vgg16 b1", "resnet50 b128", "transformer 8192 tokens"} <= names
    assert sum(case.suite == "vgg16 b1" for case in CASES.values()) == 15
    conv = CASES["vgg16 b8 conv4_3"].wanted("cpu", torch.float32)
    assert conv.problem.block == (64, 32) and pools(conv.layer) and conv.x.shape == (8, 512, 28, 28)
    assert 44 <= conv.layer.n_blocks <= 48, "34 % of 128 blocks, and a block for every empty row"
    other = CASES["vgg16 b8 conv4_3"].wanted("cpu", torch.float32, "random")
    assert conv.layer.indptr.diff().max() > other.layer.indptr.diff().max(), "rows are less uneven"
    small = CASES["vgg16 b8 conv1_2"].wanted("cpu", torch.float32)
    assert small.problem.block == (32, 32) and len(small.layer.indptr) == 3, "two block rows at least"


@pytest.mark.parametrize("name", ["vgg16 b8 conv1_2", "resnet50 b128 3x3 512@14 /2", "transformer 16 tokens 4096-1024"])
def test_a_case_knows_its_problem_without_a_layer(name: str) -> None:
    wanted = CASES[name].wanted("cpu", torch.float16, "random")
    assert CASES[name].problem(wanted.layer.n_blocks) == wanted.problem
    assert CASES[name].is_convolution == (not name.startswith("transformer"))
