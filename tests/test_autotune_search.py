"""Spaces, costs, the search and the tuner, without a GPU: times come from a model of one."""

from __future__ import annotations

import gc
import hashlib
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import tetris
from tetris.autotune import race, tune_problems, tuner
from tetris.autotune.candidates import candidates, spread
from tetris.autotune.compile_ahead import Compiled
from tetris.autotune.compile_job import Job
from tetris.autotune.cost import estimate_us, rank
from tetris.autotune.layer_bench import LayerBench
from tetris.autotune.problems import LayerInput
from tetris.autotune.space import boxes, config_space, default_config, is_valid
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.autotune.timer import Timing
from tetris.autotune.tune_problems import Search, Wanted
from tetris.autotune.tuner import Tuning, apply_tuned, sparse_layers, tune_model
from tetris.errors import TetrisError, UnsupportedError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.layout import ceil_div
from tetris.tuned_choices import Entry, problem_key

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
    assert ("decode" in kinds) == (isinstance(problem, LinearProblem) and 1 < problem.tokens <= 16)
    assert ("vector" in kinds) == (isinstance(problem, LinearProblem) and problem.tokens == 1)
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
def test_few_candidates_come_close_to_all(problem) -> None:
    few = candidates(problem, H200, budget=24)
    everything = config_space(problem, H200)
    assert few[0] == default_config(problem, H200) and len(few) == len(set(few)) <= 24
    assert min(true_time(problem, c) for c in few) <= 1.08 * min(true_time(problem, c) for c in everything)


@pytest.mark.parametrize("problem", PROBLEMS[:4] + PROBLEMS[5:], ids=str)
def test_a_full_search_leaves_out_only_what_is_estimated_slow(problem) -> None:
    full = candidates(problem, H200)
    space = config_space(problem, H200)
    assert full[0] == default_config(problem, H200) and len(full) == len(set(full))
    assert set(full) <= set(space)
    least = min(estimate_us(problem, H200, c) for c in space)
    assert full == candidates(problem, H200, space=space)
    assert {c for c in space if c.kernel != "portable" and estimate_us(problem, H200, c) <= 1.5 * least} <= set(full)
    assert min(true_time(problem, c) for c in full) <= 1.03 * min(true_time(problem, c) for c in space)


def test_spread_takes_different_tiles_first() -> None:
    a, b = Conv2dConfig(num_stages=3), Conv2dConfig(num_stages=5)
    c = Conv2dConfig(tile_w=32)
    assert spread([a, b, c], 2) == [a, c] and spread([a, b, c], 3) == [a, c, b]


def test_what_shares_a_kernel_is_compiled_together_and_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = converted()
    layer = sparse_layers(fast)["0"]
    wanted = [Wanted(str(n), layer, LayerInput((n, 64), torch.float16, x.device, False)) for n in (300, 500)]
    queues: list[list[list[Job]]] = []

    class Pool:
        def __init__(self, batches, device, team, workers, server) -> None:
            queues.append(batches)

        def results(self, on_progress, seconds, meanwhile) -> list[Compiled]:
            return [Compiled(str(index), 0.0) for index in range(sum(map(len, queues[0])))]

        def close(self) -> None: ...

    a, b, c = (LinearConfig(tile_tokens=tile) for tile in (16, 32, 64))
    long = LinearConfig(kernel="hopper", tile_tokens=128)
    monkeypatch.setattr(tune_problems, "CompilePool", Pool)
    search = Search(wanted, H200)
    first, second = (item.key for item in search.wanted)
    search.tried = {first: [a, b, long], second: [b, a, c, long]}
    search.compile()
    tokens = {item.key: item.problem.tokens for item in search.wanted}
    order = [[(first, long), (second, long)], [(second, c)], [(second, b), (first, b)], [(first, a), (second, a)]]
    found = [[(job.problem.tokens, job.config) for job in batch] for batch in queues[0]]
    assert found == [[(tokens[k], c.to_key()) for k, c in batch] for batch in order]
    assert [done.reason for done in search.compiled[first]] == ["5", "4", "0"]
    assert [done.reason for done in search.compiled[second]] == ["3", "6", "2", "1"]
    assert set(search.steps.seconds) == {"start", "wait", "close"}
    search.tried = {first: [a, b, c, long], second: []}
    jobs = {first: wanted[0].jobs(search.tried[first]), second: []}
    for band, expected in ((None, [long, c, b, a]), (2, [a, b, long, c])):
        assert [job.config for (job,) in search.batches(jobs, band)] == [config.to_key() for config in expected]


def test_launches_are_prepared_ahead_beginning_with_what_this_process_will_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What would take too much memory, what fails and what is no GPU's is left for later."""
    fast, _ = converted()
    layer, made = sparse_layers(fast)["0"], []

    def launched_ahead(layer, x, config):
        made.append((x.shape[0], config))
        if config == b:
            raise RuntimeError("out of memory")
        return layer

    gpu = torch.device("cuda")
    wanted = [Wanted(str(n), layer, LayerInput((n, 64), torch.float16, gpu, False)) for n in (3000, 2000, 1000)]
    monkeypatch.setattr(tune_problems, "launched_ahead", launched_ahead)
    search = Search(wanted, H200, Team(0, 1, Team.alone().board))
    search.wanted, search.team = wanted, Team(1, 2, search.team.board)
    a, b, c = (LinearConfig(tile_tokens=tile) for tile in (16, 32, 64))
    keys = {item.problem.tokens: item.key for item in wanted}
    search.tried = {keys[3000]: [a, b], keys[2000]: [a, b, c], keys[1000]: [c]}
    assert len(list(search._launches_ahead())) == 6
    assert made == [(2000, a), (2000, b), (2000, c), (3000, a), (3000, b), (1000, c)]
    assert list(search.ahead[keys[2000]]) == [a, c], "what failed fails again when it is measured, and is noted there"
    made.clear()
    monkeypatch.setattr(tune_problems, "AHEAD_BYTES", 2 * layer.values.nbytes)
    assert len(list(search._launches_ahead())) == 2 and made == [(3000, a), (3000, b)]
    search.wanted = [Wanted("cpu", layer, LayerInput((3000, 64), torch.float16, torch.device("cpu"), False))]
    assert list(search._launches_ahead()) == []


def test_races_drop_losers_early_and_find_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every heat the clock of the stand-in GPU slows by a tenth: ratios stand, and the loser's few runs suffice."""
    true = {"fast": 100.0, "close": 103.0, "slower": 130.0, "slow": 400.0}
    heats: list[tuple[set[str], int]] = []

    def heat_us(runs, device, repeats, warmup):
        heats.append((set(runs), repeats))
        return {name: Timing.of([true[name] * 1.1 ** len(heats)] * repeats) for name in runs}

    monkeypatch.setattr(race, "heat_us", heat_us)
    found = race.race(dict.fromkeys(true, lambda: None), "cpu")
    assert [names for names, _ in heats] == [set(true), set(true) - {"slow"}, {"fast", "close"}]
    assert sorted(found, key=found.__getitem__) == list(true)
    assert found["slow"] / found["fast"] == pytest.approx(4) and found["fast"] == pytest.approx(100 * 1.1**3)
    assert race.race({}, "cpu") == {}


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


def test_a_model_is_tuned_once_stored_and_resumed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole flow, with CPU layers standing in for a GPU's: they ignore their configuration."""
    monkeypatch.setattr(tuner, "require_gpu", lambda devices: None)
    monkeypatch.setattr(tuner, "device_info", lambda device: H200)
    fast, x = converted()
    store = TuningStore(tmp_path, tables=tmp_path / "none")
    calls: list[tuple[str, int, int]] = []
    found = tune_model(fast, x, store=store, budget=5, workers=0, progress=lambda *call: calls.append(call))
    assert f"{found.ruled_out} configurations ruled out" in str(found) and found.ruled_out > 20
    assert len(found.entries) == 1 and not found.reused and calls[-1][1:] == (1, 1)  # both layers are one problem
    assert list(found.layers.values()) == [["0", "2"]]
    key = found.entries[0].config.to_key()
    assert all(layer.config == key for layer in sparse_layers(fast).values())
    again = tune_model(fast, x, store=TuningStore(tmp_path, tables=tmp_path / "none"), budget=5, workers=0)
    assert again.entries == found.entries and len(again.reused) == 1 and "known" in str(again)


def test_wrong_and_failing_configurations_are_noted_not_taken() -> None:
    fast, x = converted()
    layer = sparse_layers(fast)["0"]
    bench = LayerBench(layer, LayerInput((8, 64), x.dtype, x.device, False))
    good, wrong, broken = LinearConfig(), LinearConfig(num_warps=8), LinearConfig(num_stages=9)
    nothing = LinearConfig(num_stages=2)

    class Changed:
        def __init__(self, config: LinearConfig) -> None:
            self.config = config

        def _forward(self, x: torch.Tensor, residual: None) -> torch.Tensor:
            if self.config == broken:
                raise KeyError("out of resource: shared memory")
            return layer(x) * {wrong: 1.1, nothing: math.nan}.get(self.config, 1.0)

    bench.layer_with = Changed  # type: ignore[method-assign,assignment]
    assert set(bench.race([good, wrong, broken, nothing])) == {good}
    assert "differs" in bench.failures[wrong] and "nan" in bench.failures[nothing]
    assert "shared memory" in bench.failures[broken]
    assert bench.final([good, broken])[good].repeats == 25


def test_what_was_captured_ends_with_the_bench_and_does_not_wait_for_the_collector() -> None:
    fast, x = converted()
    bench = LayerBench(sparse_layers(fast)["0"], LayerInput((8, 64), x.dtype, x.device, False))
    gc.collect()
    gc.disable()
    try:
        assert len(bench.race([LinearConfig(), LinearConfig(num_warps=8)])) == 2
        runs = [weakref.ref(run) for run in bench._runs.values()]
        assert len(runs) == 2 and all(run() for run in runs)
        del bench
        assert not any(run() for run in runs)
    finally:
        gc.enable()


def test_tuning_prints_gain_and_failures() -> None:
    entry = Entry(
        H200.name, H200.capability, H200.triton_version, linear(), LinearConfig(kernel="hopper"), 50.0, 75.0, 12
    )
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
