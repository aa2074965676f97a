"""``tetris.plan`` from model to plan. Times are recorded ones: the clock is replaced, everything else is real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tetris
from tests.support.fake_gpu import clock
from tetris.autotune import measure, whole_network
from tetris.autotune.measure import Epilogue, LayerTimer, ReorderedBlocks
from tetris.autotune.plan_picture import block_speedup, plot_plan
from tetris.autotune.planner import fused_epilogues, plan
from tetris.autotune.problems import LayerInput, capture_inputs, flop, problem_of, size_bytes
from tetris.autotune.timer import Timing
from tetris.errors import TetrisError
from tetris.kernels.configs import Conv2dProblem, LinearProblem
from tetris.models import resnet18
from tetris.plans import EndToEnd, ModelPlan
from tetris.reordering import reorder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.unused = nn.Linear(64, 64)
        self.fc = nn.Linear(64, 48)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.conv1(x))).relu().mean((2, 3))
        return self.fc(self.dropout(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def recorded_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block-sparse layer takes its kept fraction of the dense time, plus an overhead that shrinks with blocks."""

    def times(runs, **options):
        result = {}
        for name, run in runs.items():
            run()
            (cell,) = [c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, nn.Module)]
            us = 100.0
            if not name.startswith("dense"):
                us = 100.0 * cell.kept_fraction + 640.0 / cell.block[0]
            result[name] = Timing(us, us, us, 1)
        return result

    monkeypatch.setattr(measure, "time_us", times)
    whole = {"dense": 1000.0, "dense as given": 1100.0, "converted": 500.0}
    monkeypatch.setattr(whole_network, "time_us", clock(whole))


def test_plans_every_layer_and_says_why(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, 0.75, blocks=(8, 16, 32))
    assert [layer.name for layer in found] == ["conv1", "conv2", "fc", "unused"]
    assert found.blocks == {"conv2": (32, 16), "fc": (32, 32)}
    assert found["conv1"].block is None and "no sparsity" in found["conv1"].reason
    assert found["unused"].block is None and "do not reach" in found["unused"].reason
    assert found["conv2"].input_shape == (2, 32, 8, 8) and found["conv2"].speedup == pytest.approx(100 / 45)
    assert found.dtype == "float32" and found.speedup > 1 and 0 < found.retained < 1


def test_measured_retained_is_what_reordering_reports(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, {"conv2": 0.75}, blocks=(16,))
    (candidate,) = [c for c in found["conv2"].candidates if c.block]
    assert candidate.retained == pytest.approx(reorder(net.conv2.weight, 16, 0.75, "sort").retained, abs=1e-6)
    assert candidate.kept_fraction == 0.25 and found["fc"].block is None


def test_dense_stays_where_blocks_do_not_pay(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, 0.05, blocks=(8, 16))
    assert found.blocks == {} and found.speedup == 1.0 and "dense wins" in found["conv2"].reason


def test_auto_meets_the_target(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, "auto", blocks=(16, 32), target_speedup=1.5)
    assert found.speedup >= 1.5 and "target 1.5x" in found.budget
    assert {len({c.sparsity for c in layer.candidates}) for layer in found if layer.candidates} == {6}
    easier = plan(net, X, "auto", blocks=(16, 32), target_speedup=1.1)
    assert easier.retained > found.retained


def test_the_whole_network_is_measured_last(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, 0.75, blocks=(16, 32))
    assert found.end_to_end == EndToEnd("eager", 999.0, 499.0) and "whole network (eager)" in str(found)
    assert plan(net, X, 0.75, blocks=(16, 32), whole=None).end_to_end is None
    with pytest.raises(TetrisError, match="eager, graph, compile; got 'quickly'"):
        plan(net, X, 0.75, blocks=(16,), whole="quickly")


def test_a_network_that_is_slower_as_a_whole_goes_back_to_dense(
    net: Net, recorded_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_network, "time_us", clock({"dense": 100.0, "converted": 200.0}))
    found = plan(net, X, 0.75, blocks=(16, 32))
    assert found.blocks == {} and "every layer dense" in str(found)
    assert all(layer.chosen is layer.dense for layer in found)


def test_the_baseline_has_its_batch_norms_folded() -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=4, width=8).eval()
    x = torch.randn(1, 3, 32, 32)
    folded = whole_network.dense_baseline(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert folded.conv1.weight.is_contiguous(memory_format=torch.channels_last) and model.conv1.weight.is_contiguous()


def test_a_model_that_cannot_be_traced_is_its_own_baseline() -> None:
    class Branching(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Branching()
    assert type(whole_network.dense_baseline(model, X)) is Branching


def test_loss_budget_is_kept(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, "auto", blocks=(16, 32), max_importance_loss=0.3)
    assert found.retained >= 0.7 and found.speedup > 1


def test_the_plan_drives_prune_and_convert(net: Net, recorded_clock: None) -> None:
    found = plan(net, X, 0.75, blocks=(16, 32))
    pruned = tetris.prune(net, plan=found, example_inputs=X, method="sort")
    fast = tetris.convert(pruned, example_inputs=X, plan=found)
    blocks = {name: record.block for name, record in fast.conversion.layers.items() if record.block}
    assert blocks == found.blocks
    torch.testing.assert_close(fast(X), pruned.eval()(X), rtol=1e-4, atol=1e-4)


def test_the_model_and_the_callers_settings_are_untouched(net: Net, recorded_clock: None) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    state, benchmark = torch.random.get_rng_state(), torch.backends.cudnn.benchmark
    plan(net, X, 0.75, blocks=(16,))
    assert net.training and net.dropout.training and torch.backends.cudnn.benchmark == benchmark
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_really_measures_on_this_machine(net: Net) -> None:
    found = plan(net, X, 0.75, blocks=(16,), repeats=3, seconds_per_layer=0.1)
    assert all(c.time_us > 0 for layer in found for c in layer.candidates)
    for layer in found:
        assert layer.block is None or layer.speedup > 1


def test_the_plan_is_drawn(net: Net, recorded_clock: None, tmp_path) -> None:
    found = plan(net, X, 0.75, blocks=(8, 16, 32))
    assert block_speedup(found["conv2"], (32, 16)) == pytest.approx(100 / 45)
    assert block_speedup(found["conv1"], (32, 16)) is None
    assert b"<svg" in plot_plan(found, tmp_path / "deep" / "plan.svg").read_bytes()[:600]


def test_a_candidate_that_does_not_run_is_recorded_and_never_chosen(
    net: Net, recorded_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tetris.BlockSparseConv2d.forward

    def forward(layer, x, residual=None):
        if layer.block == (32, 16):
            raise RuntimeError("error encountered during parsing")
        return whole(layer, x, residual)

    monkeypatch.setattr(tetris.BlockSparseConv2d, "forward", forward)
    found = plan(net, X, 0.75, blocks=(16, 32))["conv2"]
    assert found.block == (16, 16) and "2 did not run (32x16 at 0.75: RuntimeError: error" in found.reason
    assert {c.block for c in found.candidates} == {None, (16, 16)} and len(found.failures) == 2
    only = plan(net, X, 0.75, blocks=(32,))
    assert only["conv2"].block is None and "no block" in only["conv2"].reason
    assert ModelPlan.from_json(only.to_json()) == only


def test_layers_are_measured_with_the_epilogue_that_conversion_fuses() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 1))
    found = fused_epilogues(model, torch.randn(1, 16, 8, 8), ["0", "3"])
    assert found == {"0": Epilogue("relu", True), "3": Epilogue("none", False)}
    timer = LayerTimer((16,), repeats=3, seconds=0.0)
    x = LayerInput((1, 16, 8, 8), torch.float32, torch.device("cpu"), False)
    measured = timer.measure(model[0], x, (0.5,), found["0"])
    assert len(measured.candidates) == 2 and measured.failures == ()
    assert fused_epilogues(model, torch.randn(1, 16, 8, 8), []) == {}


def test_progress_is_told(net: Net, recorded_clock: None) -> None:
    calls: list[tuple[str, int, int]] = []
    plan(net, X, 0.75, blocks=(16,), progress=lambda *call: calls.append(call))
    assert calls[0] == ("conv1", 0, 4) and calls[-1][1:] == (4, 4) and len(calls) == 5


def test_bad_requests_are_named(net: Net) -> None:
    with pytest.raises(TetrisError, match="without a budget"):
        plan(net, X, "auto")
    with pytest.raises(TetrisError, match="auto"):
        plan(net, X, "often", target_speedup=2.0)
    with pytest.raises(TetrisError, match="got both"):
        plan(net, X, 0.5, target_speedup=2.0, max_importance_loss=0.1)
    pruned = tetris.prune(net, 0.5, block=16, method="none")
    with pytest.raises(TetrisError, match="pruned already"):
        plan(pruned, X, 0.5)


def test_one_reordering_answers_for_every_sparsity() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    blocks = ReorderedBlocks.of(weight, "l1", reorder(weight, 16, 0.5, "sort"))
    assert blocks.retained(0.5) == pytest.approx(blocks.reordering.retained, abs=1e-6)
    assert blocks.at(0.75).layout.n_blocks == 3
    sparsity = blocks.sparsity_retaining(0.6)
    assert blocks.retained(sparsity) >= 0.6 > blocks.retained(sparsity + 1 / 12)


def test_capture_sees_the_first_input_in_order_of_execution(net: Net) -> None:
    found = capture_inputs(net, (X.to(memory_format=torch.channels_last),), {"fc": net.fc, "conv1": net.conv1})
    assert list(found) == ["conv1", "fc"]
    assert found["conv1"].channels_last and found["fc"].shape == (2, 64)
    assert found["conv1"].random(torch.device("cpu")).is_contiguous(memory_format=torch.channels_last)


def test_problem_of_a_layer_counts_its_work(net: Net) -> None:
    conv = tetris.BlockSparseConv2d.from_dense(net.conv2, reorder(net.conv2.weight, 16, 0.75, "sort"))
    x = LayerInput((2, 32, 8, 8), torch.float16, torch.device("cpu"), True)
    problem = problem_of(conv, x)
    assert problem == Conv2dProblem(2, 32, 64, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1), (16, 16), "float16", conv.n_blocks)
    assert flop(problem) == 2 * conv.n_blocks * 256 * 9 * 2 * 16
    assert size_bytes(problem) == 2 * (2 * 64 * 32 + 2 * 16 * 64 + conv.n_blocks * 256 * 9)
    linear = tetris.BlockSparseLinear.from_dense(net.fc, reorder(net.fc.weight, 16, 0.5, "sort"))
    problem = problem_of(linear, torch.zeros(3, 5, 64))
    assert problem == LinearProblem(15, 64, 48, (16, 16), "float32", linear.n_blocks)
    assert flop(problem) == 2 * 15 * linear.n_blocks * 256


def test_timer_defaults_follow_the_device() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 128), LayerInput((4, 128), torch.float32, torch.device("cpu"), False)
    found = LayerTimer(repeats=3, seconds=0.0).measure(layer, x, (0.5,)).candidates
    assert [c.block for c in found if c.sparsity == 0.5] == [(16, 16), (32, 32), (64, 32), (64, 64)]
