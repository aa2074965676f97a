"""The bench of what a call costs the CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from tetris.bench import eager_bench, eager_networks, host_time
from tetris.bench.eager_bench import CASES, EagerCase, kernel_of, layers
from tetris.bench.eager_networks import converted, plans_folder
from tetris.bench.host_time import host_us
from tetris.bench.networks import NETWORKS, trained_like
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.plans import LayerPlan, ModelPlan
from tetris.specs import prunable_layers
from tetris.stem import StemConv2d


def arguments(*given: str, quick: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    eager_bench.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(["--repeats", "1", *given])), device="cpu", quick=quick)


def test_a_quick_run_times_all_ways_and_prints_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = eager_bench.run(arguments("--profile", "--backend", "aot_eager"))
    ways = ["dense", "tetris", "tetris registered", "dense compiled", "tetris compiled"]
    assert [row.provider for row in rows] == ways * 3
    assert all(row.median_us > 0 for row in rows)
    assert rows[1].speedup == pytest.approx(rows[0].median_us / rows[1].median_us) and rows[1].extra["kernel"] == "cpu"
    assert "cumulative" in capsys.readouterr().out


def test_layers_are_chosen_by_name_and_may_stay_uncompiled() -> None:
    rows = eager_bench.run(arguments("--only", "64-64", "--backend", "none"))
    assert [(row.case, row.provider) for row in rows] == [
        ("64-64", "dense"), ("64-64", "tetris"), ("64-64", "tetris registered")
    ]  # fmt: skip


def test_networks_are_run_in_all_ways() -> None:
    given = ["--only", "--network", "small-mlp", "--batch", "2", "--backend", "aot_eager"]
    rows = eager_bench.run(arguments(*given))
    ways = ["dense eager", "dense compiled", "tetris eager", "tetris compiled"]
    assert [row.provider for row in rows] == ways and {row.case for row in rows} == {"small-mlp b2"}
    assert all(row.median_us > 0 and row.extra["cpu_us"] > 0 and row.error < 1e-5 for row in rows)
    assert rows[2].speedup == pytest.approx(rows[0].median_us / rows[2].median_us)


def test_a_saved_plan_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (plans_folder("cpu").parent.parent / "h200" / "plans" / "vgg16_b1.json").is_file()
    case = NETWORKS["small-mlp"]
    model, x = trained_like(case, "cpu", torch.float32), case.inputs(2, "cpu", torch.float32)
    assert any(isinstance(layer, BlockSparseLinear) for layer in converted(case, model, x).modules())
    kept = [LayerPlan(name, "linear", tuple(layer.weight.shape), None, 0.0, 1.0, (2, 8), (), "dense")
            for name, layer in prunable_layers(model).items()]  # fmt: skip
    ModelPlan(tuple(kept)).save(tmp_path / "small-mlp_b2.json")
    monkeypatch.setattr(eager_networks, "plans_folder", lambda device: tmp_path)
    assert not any(isinstance(layer, BlockSparseLinear) for layer in converted(case, model, x).modules())


def test_layers_are_what_the_case_says() -> None:
    kinds = {"first": StemConv2d, "conv": BlockSparseConv2d, "linear": BlockSparseLinear}
    made = {
        "first": EagerCase("first", "stem", (16, 3), 1, 8),
        "conv": EagerCase("conv", "hopper", (32, 16), 2, 8, 1, (16, 16)),
        "linear": EagerCase("linear", "split", (32, 48), 2, block=(16, 16), permuted=True),
    }
    for name, case in made.items():
        dense, ours, x = layers(case, "cpu", torch.float32)
        assert isinstance(ours, kinds[name]) and ours(x).shape == dense(x).shape and kernel_of(ours, x) == "cpu"
    assert ours.input_permutation is not None and ours.output_permutation is not None
    assert {case.kernel for case in CASES} == {
        "hopper", "hopper_linear", "portable", "stem", "narrow", "split", "decode", "vector"
    }  # fmt: skip


def test_calls_are_counted() -> None:
    called: list[int] = []
    timing = host_us(lambda x: called.append(1), torch.zeros(1), repeats=2, calls=5)
    assert len(called) == 3 + 2 * 5 and timing.repeats == 2 and timing.median_us > 0


def test_a_call_of_several_layers_counts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10**9, 40_000))  # every reading of the clock is 40 us later
    monkeypatch.setattr(host_time.time, "perf_counter_ns", lambda: next(ticks))
    assert host_us(lambda x: None, torch.zeros(1), 3, calls=5, layers=2).median_us == 4.0
