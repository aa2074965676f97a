"""Spaces, costs, the search and the tuner, without a GPU: times come from a model of one."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import tetris
from tetris.autotune import tuner
from tetris.autotune.cost import estimate_us, rank
from tetris.autotune.problems import LayerInput
from tetris.autotune.search import difference, search, spread
from tetris.autotune.space import boxes, config_space, default_config, is_valid
from tetris.autotune.store import Entry, TuningStore
from tetris.autotune.tune_problem import LayerBench, first_jobs, tune_problem
from tetris.autotune.tuner import Tuning, apply_tuned, sparse_layers, tune_model
from tetris.errors import TetrisError, UnsupportedError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.layout import ceil_div

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
A100 = DeviceInfo("NVIDIA A100", (8, 0), 108, "3.7.1")


def conv(
    batch: int = 128, channels: int = 512, size: int = 28, block=(64, 32), dtype="float16", stride=1
) -> Conv2dProblem:
    kept = max(1, round(0.27 * ceil_div(channels, block[0]) * ceil_div(channels, block[1])))
    return Conv2dProblem(
        batch, channels, channels, size, size, (3, 3), (stride, stride), (1, 1), (1, 1), block, dtype, kept
    )


def linear(tokens: int = 8192, block=(64, 64)) -> LinearProblem:
    return LinearProblem(tokens, 4096, 4096, block, "float16", 1100)


PROBLEMS = [
    conv(),
    conv(1),
    conv(8, 64, 224, (32, 16)),
    conv(32, 96, 15, (48, 24), stride=2),
    conv(dtype="float32"),
    linear(),
    linear(1),
    linear(16, (32, 16)),
    linear(300, (128, 32)),
]


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_spaces_are_valid_distinct_and_start_with_the_default(problem, device: DeviceInfo) -> None:
    space = config_space(problem, device)
    assert space[0] == default_config(problem, device)
    assert len(set(space)) == len(space) > 5
    assert all(is_valid(problem, device, config) for config in space[1:])
    kinds = {config.kernel for config in space}
    assert ("decode" in kinds) == (isinstance(problem, LinearProblem) and problem.tokens <= 16)
    if device is A100:
        assert "hopper" not in kinds and not any(config.descriptors for config in space if config.kernel == "portable")


def test_hopper_space_exists_where_the_kernel_does() -> None:
    assert "hopper" in {config.kernel for config in config_space(conv(), H200)}
    assert "hopper" in {config.kernel for config in config_space(linear(), H200)}
    assert "hopper" not in {config.kernel for config in config_space(conv(stride=3), H200)}
    assert not is_valid(conv(stride=3), H200, Conv2dConfig(kernel="hopper"))
    assert not is_valid(linear(), A100, LinearConfig(kernel="hopper"))
    assert not is_valid(linear(64), H200, LinearConfig(kernel="decode"))


def test_configurations_beyond_registers_or_shared_memory_are_invalid() -> None:
    assert is_valid(conv(), H200, Conv2dConfig(tile_n=1, tile_h=16, tile_w=16, num_warps=4))
    assert not is_valid(conv(), H200, Conv2dConfig(tile_n=2, tile_h=16, tile_w=16, num_warps=4))
    assert not is_valid(conv(block=(64, 64)), A100, Conv2dConfig(tile_h=16, tile_w=16, num_warps=8, num_stages=9))


def test_boxes_cover_without_much_waste() -> None:
    found = boxes(conv(size=28), 128, 1.15)
    assert (8, 4, 4) in found and (1, 1, 128) not in found
    assert all(n * h * w == 128 for n, h, w in found)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_no_estimate_beats_the_roofline(problem) -> None:
    from tetris.autotune.ceilings import H200_FP16
    from tetris.autotune.problems import flop, size_bytes

    floor = H200_FP16.least_us(flop(problem), size_bytes(problem))
    estimates = [estimate_us(problem, H200, config) for config in config_space(problem, H200)]
    assert all(math.isfinite(us) and us >= 0.99 * floor for us in estimates)


def test_estimates_know_what_the_measurements_taught() -> None:
    """On an H200 the halo-sharing kernel beat the portable one, and full tiles beat small ones (512 channels @28)."""
    problem = conv()
    hopper = Conv2dConfig(kernel="hopper", tile_n=32, tile_h=4, tile_w=4, tile_k=32)
    portable = Conv2dConfig(tile_n=16, tile_h=4, tile_w=4, tile_k=32, num_stages=7)
    small = Conv2dConfig(tile_n=2, tile_h=4, tile_w=4, tile_k=32, num_stages=7)
    assert estimate_us(problem, H200, hopper) < estimate_us(problem, H200, portable) < estimate_us(problem, H200, small)
    assert rank(problem, H200, [small, portable, hopper]) == [hopper, portable, small]


MEASURED_HOPPER = {
    # problem: {(tile_n, tile_h, tile_w, tile_k): microseconds on an H200, random layout}
    replace(conv(128, 512, 14, (64, 64)), n_blocks=17): {
        (32, 7, 2, 32): 54.1, (32, 4, 2, 32): 62.4, (16, 4, 4, 32): 69.9, (64, 4, 2, 32): 87.3,
    },
    replace(conv(128, 256, 56, (64, 32)), n_blocks=9): {
        (16, 4, 8, 32): 201.4, (8, 8, 8, 32): 209.5, (8, 4, 16, 32): 218.1,
    },
    replace(conv(128, 512, 28, (64, 32)), n_blocks=32): {
        (32, 4, 4, 32): 172.4, (16, 7, 4, 32): 173.5, (16, 4, 4, 32): 186.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", MEASURED_HOPPER, ids=str)
def test_estimates_agree_with_recorded_measurements(problem) -> None:
    measured = MEASURED_HOPPER[problem]
    for (n, h, w, k), us in measured.items():
        config = Conv2dConfig(kernel="hopper", tile_n=n, tile_h=h, tile_w=w, tile_k=k)
        assert estimate_us(problem, H200, config) == pytest.approx(us, rel=0.3)


def test_estimates_order_the_tiles_of_a_small_image() -> None:
    problem, measured = next(iter(MEASURED_HOPPER.items()))
    tiles = sorted(measured, key=lambda t: measured[t])
    configs = [Conv2dConfig(kernel="hopper", tile_n=n, tile_h=h, tile_w=w, tile_k=k) for n, h, w, k in tiles]
    ranked = rank(problem, H200, configs[::-1])
    assert ranked[0] == configs[0] and ranked[-1] == configs[-1]


def true_time(problem, config) -> float:
    """A GPU that mostly agrees with the estimate: each configuration is off by up to 35 %, always the same."""
    digest = hashlib.sha256(config.to_key().encode()).digest()[0] / 255
    quirk = 1 + 0.15 * (config.num_warps == 4) + 0.1 * (config.tile_k != 32)
    return estimate_us(problem, H200, config) * quirk * (1 + 0.1 * digest)


@pytest.mark.parametrize("problem", PROBLEMS[:4] + PROBLEMS[5:], ids=str)
def test_search_measures_few_and_comes_close_to_all(problem) -> None:
    ranked = rank(problem, H200, config_space(problem, H200))
    calls: list[object] = []

    def measure(configs):
        calls.extend(configs)
        return {config: true_time(problem, config) for config in configs}

    found = search(ranked, measure, budget=24)
    assert len(calls) == len(set(calls)) == len(found.measured) <= 24
    best = min(true_time(problem, config) for config in ranked)
    assert found.time_us <= 1.08 * best
    assert found.time_us == found.measured[found.best] == min(found.measured.values())


def test_search_survives_failing_configurations() -> None:
    ranked = rank(conv(), H200, config_space(conv(), H200))
    bad = {config for i, config in enumerate(ranked) if i % 2 == 0}
    found = search(
        ranked, lambda configs: {c: math.inf if c in bad else true_time(conv(), c) for c in configs}, budget=16
    )
    assert found.best not in bad and math.isfinite(found.time_us)


def test_spread_takes_different_tiles_first() -> None:
    a, b = Conv2dConfig(num_stages=3), Conv2dConfig(num_stages=5)
    c = Conv2dConfig(tile_w=32)
    assert spread([a, b, c], 2) == [a, c] and spread([a, b, c], 3) == [a, c, b]
    assert difference(a, b) == 1 and difference(a, c) == 2


def test_tuning_a_problem_compares_with_the_default() -> None:
    tried: list[int] = []

    def measure(configs, repeats):
        tried.append(repeats)
        return {config: true_time(conv(), config) for config in configs}

    entry = tune_problem(conv(), H200, measure, budget=16)
    assert entry.time_us <= entry.default_us == true_time(conv(), default_config(conv(), H200))
    assert entry.problem == conv() and entry.tried <= 16 and tried[-1] == 25
    with pytest.raises(TetrisError, match="no configuration"):
        tune_problem(conv(), H200, lambda configs, repeats: dict.fromkeys(configs, math.inf), budget=4)


def converted() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)
    return tetris.convert(tetris.prune(model, 0.5, block=16, method="none"), example_inputs=x), x


def test_the_cpu_has_nothing_to_tune(tmp_path) -> None:
    fast, x = converted()
    store = TuningStore(tmp_path)
    assert apply_tuned(fast, x, store) == {}
    with pytest.raises(UnsupportedError, match="GPU"):
        tune_model(fast, x, store=store)
    with pytest.raises(TetrisError, match=r"tetris\.convert"):
        tune_model(nn.Linear(4, 4), torch.zeros(1, 4), store=store)
    assert not (tmp_path / "tuning.json").exists()


def test_what_a_search_measures_first_is_compiled_ahead() -> None:
    fast, _ = converted()
    layer = sparse_layers(fast)["0"]
    jobs = first_jobs([(linear(), layer)], H200, budget=10)
    measured: list[list[object]] = []

    def measure(configs, repeats):
        measured.append([config.to_key() for config in configs])
        return {config: true_time(linear(), config) for config in configs}

    tune_problem(linear(), H200, measure, budget=10)
    assert [job.config for job in jobs] == measured[0] and len(jobs) == 6
    assert all(job.activation == "relu" and job.bias and not job.max_pool for job in jobs)


def test_a_model_is_tuned_once_stored_and_resumed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole flow, with CPU layers standing in for a GPU's: they ignore their configuration."""
    monkeypatch.setattr(tuner, "require_gpu", lambda devices: None)
    monkeypatch.setattr(tuner, "device_info", lambda device: H200)
    fast, x = converted()
    store = TuningStore(tmp_path, tables=tmp_path / "none")
    calls: list[tuple[str, int, int]] = []
    found = tune_model(fast, x, store=store, budget=5, processes=0, progress=lambda *call: calls.append(call))
    assert len(found.entries) == 1 and not found.reused and calls[-1][1:] == (1, 1)  # both layers are one problem
    assert list(found.layers.values()) == [["0", "2"]]
    key = found.entries[0].config.to_key()
    assert all(layer.config == key for layer in sparse_layers(fast).values())
    again = tune_model(fast, x, store=TuningStore(tmp_path, tables=tmp_path / "none"), budget=5, processes=0)
    assert again.entries == found.entries and len(again.reused) == 1 and "known" in str(again)
    others = tune_model(fast, x, store=store, budget=5, share=(1, 2), processes=0)
    assert others.entries == []


def test_wrong_and_failing_configurations_are_noted_not_taken() -> None:
    fast, x = converted()
    layer = sparse_layers(fast)["0"]
    failures: dict[str, str] = {}
    bench = LayerBench(layer, LayerInput((8, 64), x.dtype, x.device, False), linear(), failures)
    good, wrong, broken = LinearConfig(), LinearConfig(num_warps=8), LinearConfig(num_stages=9)

    class Changed(nn.Module):
        def __init__(self, config: str) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.config == broken.to_key():
                raise RuntimeError("out of resource: shared memory")
            return layer(x) * (1.1 if self.config == wrong.to_key() else 1.0)

    bench._with = Changed  # type: ignore[method-assign,assignment]
    times = bench([good, wrong, broken], 3)
    assert times[good] > 0 and math.isinf(times[wrong]) and math.isinf(times[broken])
    assert "differs" in failures[wrong.to_key()] and "shared memory" in failures[broken.to_key()]


def test_tuning_prints_gain_and_failures() -> None:
    entry = Entry(
        H200.name, H200.capability, H200.triton_version, linear(), LinearConfig(kernel="hopper"), 50.0, 75.0, 12
    )
    from tetris.autotune.store import problem_key

    text = str(Tuning([entry], {problem_key(linear()): ["fc1", "fc2"]}, failures={"x": "too large"}))
    assert "fc1 and 1 more" in text and "1.50" in text and "hopper" in text and "1 configurations failed" in text


@pytest.mark.gpu
def test_tunes_on_the_gpu_resumes_and_stays_right(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)).cuda().half()
    x = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    fast = tetris.convert(tetris.prune(model, 0.5, block=(64, 32), method="sort"), example_inputs=x)
    with torch.no_grad():
        before = fast(x)
    store = TuningStore(tmp_path)
    tuning = tune_model(fast, x, store=store, budget=6)
    assert len(tuning.entries) == 2 and not tuning.reused
    assert all(entry.time_us <= entry.default_us * 1.05 for entry in tuning.entries)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), before, rtol=2e-2, atol=2e-2)
    assert len(tune_model(fast, x, store=store, budget=6).reused) == 2
    for layer in sparse_layers(fast).values():
        layer.config = ""
    assert set(apply_tuned(fast, x, store).values()) == {0.0}
