"""The reordering bench: its matrices, a quick run on the CPU, and the numbers it derives."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import pytest
import torch

from tetris.bench import reorder_bench, reorder_cases, reorder_compile, reorder_times, trained
from tetris.bench.reorder_bench import doubled_edge, measure_quality, retained_by_elements
from tetris.bench.reorder_cases import CONTRAST, ReorderCase, gaussian, planted, quality_cases
from tetris.bench.reorder_times import METHODS, measure_together, measure_vgg16
from tetris.bench.rows import Row, read_csv


def arguments(tmp_path, *options: str, quick: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    reorder_bench.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(options)), device="cpu", quick=quick, out=tmp_path)


def test_planted_blocks_are_heavier_and_found_again_by_their_ceiling():
    weight, ceiling = planted(64, (16, 16), 0.75, seed=3)
    assert weight.shape == (64, 64) and 0.25 < ceiling < 0.5  # 4 of 16 blocks, 1 / CONTRAST as heavy
    assert ceiling == pytest.approx(0.25 / (0.25 + 0.75 * CONTRAST), rel=0.05)
    again, same = planted(64, (16, 16), 0.75, seed=3)
    assert torch.equal(weight, again) and ceiling == same


def test_the_suite_is_chosen_by_matrix_and_block():
    cases = quality_cases("cpu", 2, quick=True, matrices=["gaussian", "planted"], blocks=["16x16"])
    assert [case.name for case in cases] == [
        "planted 16x16 0.73 #0", "planted 16x16 0.73 #1", "gaussian 16x16 0.73 #0", "gaussian 16x16 0.73 #1",
    ]  # fmt: skip
    assert torch.equal(cases[2].weight, gaussian(128, 0)) and cases[2].ceiling is None
    full = quality_cases("cpu", 1, quick=False, matrices=["gaussian"])
    assert len(full) == 6 * 3 and full[0].weight.shape == (512, 512)


def test_networks_are_trained_on_real_digits(monkeypatch: pytest.MonkeyPatch):
    few, digits = 96, trained._digits
    monkeypatch.setattr(trained, "TRAIN_IMAGES", few)
    monkeypatch.setattr(trained, "_digits", lambda size: tuple(t[: few + 16] for t in digits(size)))
    weights = trained.trained_weights(quick=True)
    assert tuple(weights) == trained.TRAINED
    shapes = [tuple(weight.shape) for weight in weights.values()]
    assert shapes == [(500, 800), (256, 128, 3, 3), (256, 256, 3, 3), (512, 1024)]
    assert not any(weight.requires_grad for weight in weights.values())


def test_training_learns():
    torch.manual_seed(0)
    images, labels = trained._digits(8)
    assert images.shape == (1797, 1, 8, 8) and float(images.max()) == 1
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    assert trained._train(model, images, labels, epochs=8, seed=0) > 0.8


def test_no_mask_retains_more_than_the_largest_elements():
    case = ReorderCase("m", torch.tensor([[4.0, 1.0], [2.0, 3.0]]), (1, 1), 0.5, 0)
    assert retained_by_elements(case, 0.5) == pytest.approx(0.7) and retained_by_elements(case, 1.0) == 1


def test_qualities_lie_between_no_reordering_and_the_elements():
    weight, ceiling = planted(64, (16, 16), 0.73, seed=0)
    rows = {
        row.provider: row
        for row in measure_quality(ReorderCase("planted", weight, (16, 16), 0.73, 0, ceiling), "cpu", True)
    }
    assert list(rows) == [name for name, _, _ in METHODS]
    assert rows["none"].extra["share_of_gap"] == 0 and rows["paper"].extra["gain"] == 1 and rows["paper"].speedup == 1
    assert all(0 <= row.extra["share_of_gap"] <= 1 for row in rows.values() if row.provider != "sort")
    assert rows["paper"].extra["retained"] <= rows["annealed 500"].extra["elementwise"]
    assert {row.extra["planted"] for row in rows.values()} <= {0, 1} and rows["none"].extra["planted"] == 0


def test_a_quick_run_writes_and_shows_every_method(tmp_path):
    rows = reorder_bench.run(
        arguments(tmp_path, "--seeds", "1", "--matrices", "gaussian", "--blocks", "16x16", "32x16")
    )
    measured = [row for row in rows if "block_out" in row.extra]
    assert len(measured) == 2 * len(METHODS) and {row.extra["block_out"] for row in measured} == {16, 32}
    assert [row.case for row in read_csv(tmp_path / "reorder.csv")] == [row.case for row in rows]
    shown = reorder_bench.show(rows)
    assert all(name in shown for name, _, _ in METHODS) and "gain gaussian" in shown


def small_layers(sigma: float):
    return [(name, gaussian(64, seed), 0.5) for seed, name in enumerate(("conv1", "fc6"))]


def test_times_of_layers_add_up(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reorder_times, "vgg16_weights", small_layers)
    rows = reorder_bench.run(arguments(tmp_path, "--part", "vgg16", "--sigmas", "0.6", quick=False))
    assert [row.provider for row in rows[::3]] == ["sort", "paper", "batched"]
    for layers in (rows[:3], rows[3:6], rows[6:]):
        assert layers[2].case == "VGG16 all lognormal 0.6"
        assert layers[2].median_us == pytest.approx(layers[0].median_us + layers[1].median_us)
        assert layers[2].extra["swaps"] == layers[0].extra["swaps"] + layers[1].extra["swaps"]
    assert math.isnan(rows[0].extra["megabytes"]) and 0.5 < rows[0].extra["retained"] < 1
    assert "VGG16 all" in reorder_bench.show(rows)


def test_every_search_compiles_before_it_is_timed(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple] = []
    monkeypatch.setattr(reorder_bench, "reorder", lambda *arguments, steps: made.append((arguments[1:], steps)))
    reorder_bench.compile_searches(ReorderCase("m", gaussian(16, 0), (4, 2), 0.5, 0), "cpu")
    methods = dict.fromkeys(method for _, method, _ in METHODS)
    assert made == [(((4, 2), 0.5, method), 2) for method in methods]


def test_a_layer_that_fails_is_named_and_voids_the_sum(monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reorder_times, "vgg16_weights", small_layers)
    monkeypatch.setattr(reorder_times, "reorder", fails)
    rows = next(measure_vgg16(0.0, "cpu"))
    assert "out of memory" in rows[0].status and math.isnan(rows[-1].median_us)


def test_layers_together_retain_what_they_retain_one_by_one(monkeypatch: pytest.MonkeyPatch):
    row = measure_together(small_layers(0.0), "paper", "paper", 1, "cpu", "gaussian")
    alone = [reorder_bench.reorder(weight, 32, sparsity, "paper") for _, weight, sparsity in small_layers(0.0)]
    assert row.case == "VGG16 together gaussian" and row.median_us > 0 and math.isnan(row.extra["megabytes"])
    assert row.extra["swaps"] == sum(r.n_swaps for r in alone)
    totals = [float(weight.abs().sum()) for _, weight, _ in small_layers(0.0)]
    kept = sum(r.retained * total for r, total in zip(alone, totals)) / sum(totals)
    assert row.extra["retained"] == pytest.approx(kept)

    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reorder_times, "reorder_jointly", fails)
    assert "out of memory" in measure_together(small_layers(0.0), "paper", "paper", 1, "cpu", "gaussian").status


def test_what_a_run_launches_is_compiled_ahead_once_a_shape(tmp_path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[tuple] = []
    monkeypatch.setattr(reorder_bench, "compile_ahead", compiled.extend)
    options = ("--part", "compile", "--matrices", "gaussian", "planted")
    assert reorder_bench.run(arguments(tmp_path, *options)) == [] == compiled  # a CPU has nothing to compile
    args = arguments(tmp_path, *options, quick=False)
    args.device = "cuda"
    reorder_bench.run(args)
    assert compiled[0][:2] == ((4096, 25088), (32, 32)) and len(compiled) == 11 + 5  # 512 x 512 in 6 blocks, one twice
    assert len({problem[:2] for problem in compiled}) == len(compiled)


def test_searches_are_brief_when_they_only_compile(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple] = []
    monkeypatch.setattr(reorder_compile, "reorder", lambda *arguments, steps: made.append((arguments[1:], steps)))
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.ones(shape))
    reorder_compile.search_briefly(((4, 6), (2, 2), 0.5))
    assert made == [(((2, 2), 0.5, method), 2) for method in reorder_compile.METHODS]


def test_trained_weights_are_kept_from_run_to_run(tmp_path, monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []
    monkeypatch.setattr(
        trained, "trained_weights", lambda device, quick: calls.append(quick) or {"lenet fc1": gaussian(8, 0).T}
    )
    for _ in range(2):
        weights = trained.kept_weights(tmp_path / "weights.safetensors", "cpu", quick=True)
        assert list(weights) == ["lenet fc1"] and torch.equal(weights["lenet fc1"], gaussian(8, 0).T)
    assert calls == [True]


def test_an_exact_step_proves_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(reorder_times, "device_name", lambda device: "NVIDIA H200")
    row = reorder_times.measure_exact_step("case", gaussian(128, 0), 0.73, "gaussian")
    assert row.extra["optimal"] == 1 and abs(row.extra["gap"]) < 1e-6 and row.median_us > 0 and row.extra["swaps"] > 0


def test_twice_the_edge_is_compared_with_the_paper_at_once_the_edge():
    def row(provider: str, edge: int, retained: float, matrix: str = "gaussian") -> Row:
        extra = {"matrix": matrix, "sparsity": 0.73, "seed": 0, "block_out": edge, "block_in": edge}
        return Row("reorder", "c", provider, extra=extra | {"retained": retained, "gain": 1.0, "kept_fraction": 0.27})

    rows = [row("paper", 16, 0.5), row("exact", 32, 0.6), row("exact", 64, 0.9)]
    assert doubled_edge(rows, "exact") == pytest.approx([1.2]) and doubled_edge(rows, "sort") == []
    assert doubled_edge(rows, "exact", equally_many=True) == doubled_edge(rows, "exact")
    rows[1].extra["kept_fraction"] = 0.25
    assert doubled_edge(rows, "exact", equally_many=True) == []
    oblong = replace(rows[1], extra=rows[1].extra | {"block_in": 16})
    assert doubled_edge([rows[0], oblong], "exact") == []


def test_vgg16_layers_have_their_shapes_and_rates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reorder_cases, "VGG16_CONVS", reorder_cases.VGG16_CONVS[:2])
    monkeypatch.setattr(reorder_cases, "VGG16_LINEARS", reorder_cases.VGG16_LINEARS[2:])
    layers = reorder_cases.vgg16_weights(0.6)
    assert [(name, tuple(weight.shape)) for name, weight, _ in layers] == [
        ("conv1_1", (64, 3, 3, 3)), ("conv1_2", (64, 64, 3, 3)), ("fc8", (1000, 4096)),
    ]  # fmt: skip
    assert layers[0][2] == pytest.approx(0.42)
