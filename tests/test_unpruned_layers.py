"""Dense weights on the block kernel: chosen by measurement, converted with their epilogue, equal to the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import tetris
from tetris.autotune.measure import Epilogue, LayerTimer, Measured
from tetris.autotune.problems import capture_inputs
from tetris.autotune.unpruned import UnprunedLayers
from tetris.layers import BlockSparseConv2d
from tetris.models import resnet18
from tetris.plans import Candidate, LayerPlan
from tetris.specs import prunable_layers
from tetris.tolerances import relative_error, tolerance

DOWNSAMPLE = "layer2.0.downsample.0"
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class RecordedTimer(LayerTimer):
    """Answers with recorded times: 100 us dense, ``block_us`` in blocks."""

    block_us = 70.0
    calls: ClassVar[list[tuple]] = []

    def measure(self, layer, x, sparsities, epilogue=None):
        self.calls.append((self.blocks, self.method, sparsities, epilogue))
        block = Candidate((64, 64), 0.0, 1.0, 1.0, self.block_us)
        return Measured((Candidate(None, 0.0, 1.0, 1.0, 100.0), block), ())


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = resnet18().eval()
    layer = prunable_layers(model)[DOWNSAMPLE]
    x = replace(capture_inputs(model, X, {DOWNSAMPLE: layer})[DOWNSAMPLE], device=torch.device("cuda"))
    return LayerPlan(DOWNSAMPLE, "conv2d", tuple(layer.weight.shape)), layer, x


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> RecordedTimer:
    monkeypatch.setattr(RecordedTimer, "calls", [])
    return RecordedTimer()


def test_a_faster_fused_kernel_is_chosen_and_equal_layers_are_measured_once(case, timer: RecordedTimer) -> None:
    unpruned, epilogue = UnprunedLayers(timer), Epilogue("relu", residual=True)
    decided = [unpruned.decide(*case, epilogue) for _ in range(2)]
    assert [(d.block, d.sparsity, d.retained) for d in decided] == [((64, 64), 0.0, 1.0)] * 2
    assert decided[0].speedup == pytest.approx(100 / 70) and "not pruned" in decided[0].reason
    assert len(timer.calls) == 1 and timer.calls[0][1:3] == ("none", (0.0,))


def test_a_slower_one_is_not(case, timer: RecordedTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedTimer, "block_us", 99.0)
    decided = UnprunedLayers(timer).decide(*case, Epilogue("relu"))
    assert decided.block is None and decided.reason.startswith("dense wins")


@pytest.mark.parametrize("epilogue", [None, Epilogue()])
def test_nothing_is_measured_where_nothing_is_fused(case, timer: RecordedTimer, epilogue) -> None:
    assert UnprunedLayers(timer).decide(*case, epilogue).block is None and not timer.calls


def test_nothing_is_measured_on_a_cpu(case, timer: RecordedTimer) -> None:
    found, layer, x = case
    on_cpu = replace(x, device=torch.device("cpu"))
    assert UnprunedLayers(timer).decide(found, layer, on_cpu, Epilogue("relu")).block is None and not timer.calls


def test_such_a_plan_converts_to_the_same_function() -> None:
    torch.manual_seed(0)
    model = resnet18().eval()
    full = {"layer1.0.conv2": (32, 32), "layer2.0.conv2": (64, 64)}
    layers = tuple(
        LayerPlan(name, "conv2d", tuple(layer.weight.shape), full.get(name, (16, 16) if "conv1" in name else None),
                  0.5 if "conv1" in name and "layer" in name else 0.0)
        for name, layer in prunable_layers(model).items() if name != "conv1"
    )  # fmt: skip
    plan = tetris.ModelPlan(layers)
    assert plan.full_layers == full and "8 of 20 layers pruned, 2 run unpruned" in str(plan)
    pruned = tetris.prune(model, plan=plan, method="sort", example_inputs=X)
    fast = tetris.convert(pruned, X, plan=plan)
    for name, block in full.items():
        layer, record = fast.get_submodule(name), fast.conversion.layers[name]
        assert isinstance(layer, BlockSparseConv2d) and layer.kept_fraction == 1.0 and layer.block == block
        assert record.kind == "dense blocks" and record.fused == ["residual", "relu"] and not record.permutes
    with torch.no_grad():
        assert relative_error(fast(X), pruned(X)) < tolerance(torch.float32)
    assert tetris.verify(pruned, fast, X).passed
