"""The network bench on the CPU: a whole run at the smallest size, and the work it counts."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from tetris.autotune import planner
from tetris.autotune.ceilings import Ceilings
from tetris.autotune.measure import Measured
from tetris.autotune.problems import LayerInput
from tetris.bench import network_session
from tetris.bench.__main__ import bench_names, main, results_folder
from tetris.bench.cases import VGG16_CONVS, VGG16_MODULES
from tetris.bench.network_bench import others
from tetris.bench.network_session import Dense, Session, parse_blocks
from tetris.bench.network_work import dense_work
from tetris.bench.networks import NETWORKS, trained_like
from tetris.bench.rows import Row, read_csv, write_csv
from tetris.plans import ModelPlan
from tetris.specs import prunable_layers


def test_a_whole_run_writes_rows_and_plans(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--quick", "--model", "small-mlp", "--blocks", "32", "--repeats", "3", "--save-plan"]
    assert main(["network", *options, "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "network.csv")
    assert {row.provider for row in rows} >= {"dense", "32x32"}
    assert all(row.median_us > 0 and row.device.startswith("cpu") for row in rows if row.status == "ok")
    plan = ModelPlan.load(tmp_path / "plans" / "small-mlp_b64.json")
    whole = [row for row in rows if "layer" not in row.extra]
    if plan.blocks:
        assert {row.provider for row in whole} == {"dense eager", "tetris eager"}
        assert max(row.error for row in whole if row.provider == "tetris eager") < 1e-5
    else:
        assert whole[0].status.startswith("skipped")
    assert "small-mlp b64" in capsys.readouterr().out


def test_what_conversion_fuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plans = [], []
    ask = network_session.fused_epilogues
    for module in (network_session, planner):
        monkeypatch.setattr(module, "fused_epilogues", lambda *given: asked.append(given[2]) or ask(*given))
    monkeypatch.setattr(planner.LayerTimer, "measure", lambda *given: plans.append(given[4]) or Measured((), ()))
    dense = Dense.of(NETWORKS["small-mlp"], "cpu", torch.float32, "none")
    args = argparse.Namespace(device="cpu", blocks=None, plans=None, method="sort", repeats=1, seconds_per_layer=0.1)
    Session(NETWORKS["small-mlp"], dense, 4, torch.float32, Ceilings(1e10, 1e10), args).plan()
    assert len(asked) == 1 and plans == [dense.epilogues[name] for name in ("fc1", "fc2")]


def test_vgg16_is_pruned_at_the_papers_rates() -> None:
    rates = NETWORKS["vgg16"].sparsity
    assert len(rates) == 16 and rates[VGG16_MODULES["conv1_1"]] == 0.42
    assert rates[VGG16_MODULES["conv4_2"]] == 0.73 and rates[VGG16_MODULES["fc6"]] == 0.96
    with torch.device("meta"):
        layers = prunable_layers(NETWORKS["vgg16"].make())
    assert set(rates) == set(layers)


def test_work_of_a_layer_matches_the_cases() -> None:
    case = VGG16_CONVS[5].at(4)
    layer = nn.Conv2d(case.c_in, case.c_out, 3, padding=1, device="meta")
    x = LayerInput((4, case.c_in, case.height, case.width), torch.float16, torch.device("cpu"), True)
    assert dense_work(layer, x, 0.25) == (case.flop(0.25), case.bytes(0.25))


def test_trained_like_networks_keep_their_variance() -> None:
    case = NETWORKS["small-vgg16"]
    model = trained_like(case, "cpu", torch.float32)
    spread: list[float] = []
    for layer in prunable_layers(model).values():
        layer.register_forward_hook(lambda module, inputs, output: spread.append(float(output.std())))
    model(case.inputs(8, "cpu", torch.float32, seed=1))
    assert all(0.2 < value < 5 for value in spread) and len(spread) == 16
    factors = model.features[14].weight.flatten(1).norm(dim=1)
    assert float(factors.max() / factors.min()) > 3  # rows differ as in a trained network


def test_blocks_are_parsed() -> None:
    assert parse_blocks("64x32,64") == ((64, 32), 64)


def test_benches_are_found_by_their_files() -> None:
    assert "network" in bench_names() and results_folder("cpu").name == "cpu"
    with pytest.raises(SystemExit):
        main(["no-such-bench"])


def test_a_step_keeps_the_rows_of_the_others(tmp_path) -> None:
    assert others(tmp_path / "network.csv", {"vgg16 b8"}) == []
    rows = [Row("network", case, "tetris") for case in ("vgg16 b8", "vgg16 b8 features.2", "vgg16 b1", "mlp b8192 fc1")]
    write_csv(tmp_path / "network.csv", rows)
    assert [row.case for row in others(tmp_path / "network.csv", {"vgg16 b8"})] == ["vgg16 b1", "mlp b8192 fc1"]


def test_kernels_to_compile_ahead_are_those_of_the_converted_network() -> None:
    case = NETWORKS["small-vgg16"]
    dense = Dense.of(case, "cpu", torch.float32, "none")
    args = argparse.Namespace(device="cpu", blocks="16", plans=None)
    session = Session(case, dense, 4, torch.float32, Ceilings(1e10, 1e10), args)
    jobs = session.jobs()
    assert len(jobs) == 15 and all(job.bias and not job.residual for job in jobs)
    assert [job.max_pool for job in jobs].count(True) == 5
    assert {job.activation for job in jobs} == {"relu"}
    assert jobs[2].problem.n_blocks == max(2, round(2 * 1 * 0.27))
