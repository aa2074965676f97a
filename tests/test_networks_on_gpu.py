"""Whole networks on a GPU in half precision: converted, permuted, compiled, planned as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tetris
from tetris.autotune.timer import graphed
from tetris.models import MLP, Concatenating, LanguageModel, resnet18
from tetris.plans import GROUPED, LayerPlan, ModelPlan
from tetris.tolerances import relative_error, tolerance

pytestmark = pytest.mark.gpu
HALF = {"device": "cuda", "dtype": torch.float16}
"""Of models and inputs."""


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, **HALF).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("permutations", ["shared", "separate"])
@pytest.mark.parametrize("name", ["concatenating", "language model", "resnet18"])
def test_converted_networks_compute_what_the_masked_ones_do(name: str, permutations: str) -> None:
    torch.manual_seed(0)
    model, x, rates = {
        "concatenating": (Concatenating(width=64), images(4, 3, 16, 16), 0.5),
        "language model": (LanguageModel(width=128), torch.randint(256, (4, 32), device="cuda"), {"blocks.*": 0.5}),
        "resnet18": (resnet18(num_classes=16, width=64), images(2, 3, 32, 32), {"layer[12].*.conv*": 0.5}),
    }[name]
    model = model.eval().to(**HALF)
    pruned = tetris.prune(model, rates, (64, 32), "sort", permutations=permutations, example_inputs=x)
    fast = tetris.convert(pruned, x)
    report = tetris.verify(pruned, fast, x)
    assert report.passed, str(report)
    with torch.no_grad():
        y = fast(x)
        compiled = torch.compile(fast, fullgraph=True, dynamic=False)
        outputs: list[torch.Tensor] = []
        replay = graphed(lambda: outputs.append(compiled(x)))
        replay()
    assert relative_error(outputs[-1], y) < tolerance(torch.float16)


def test_a_plan_is_not_slower_as_a_whole() -> None:
    model, x = MLP(1024, 4096, 1024, activation=nn.GELU).eval().to(**HALF), torch.randn(4096, 1024, **HALF)
    plan = tetris.plan(model, x, 0.75, blocks=(64,), repeats=10)
    assert plan.end_to_end is not None and plan.end_to_end.how == "compile"
    assert plan.end_to_end.speedup >= 0.99 and (plan.blocks or plan.end_to_end.note), str(plan)
    print(plan)


def test_groups_of_outputs_move_in_the_store() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()).eval().to(**HALF), images(8, 64, 28, 28)
    plan = ModelPlan((LayerPlan("0", "conv2d", (128, 64, 3, 3), (64, 32), 0.5, output_order=GROUPED),))
    pruned = tetris.prune(model, plan=plan, method="sort", example_inputs=x)
    fast = tetris.convert(pruned, x, plan=plan)
    assert tetris.verify(pruned, fast, x).passed
    layer = fast.get_submodule("0")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert layer.output_permutation is not None and layer.launch(x).permutes_output == hopper
