"""Own orders of channels: when a data movement pays, and what prune and convert make of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import tetris
from tests.support.fake_gpu import A100, H200
from tetris.autotune.measure import Epilogue
from tetris.autotune.own_orders import (
    GROUPED_COST,
    INPUT,
    OUTPUT,
    OrderChooser,
    OwnOrder,
    best_order,
    measured_moves,
    output_shape,
    own_orders,
    saved_us,
    stores_groups,
    with_order,
    within_share,
)
from tetris.autotune.problems import LayerInput, capture_inputs
from tetris.errors import FileFormatError
from tetris.models import MLP
from tetris.permutation import expand
from tetris.plans import GROUP, GROUPED, SEPARATE, SHARED, Candidate, LayerPlan, ModelPlan
from tetris.specs import prunable_layers


def order(kind: str, saved: float, cost: float, dim: int = INPUT) -> OwnOrder:
    return OwnOrder(dim, kind, 0.6, saved, cost)


def test_the_order_that_gains_most_wins_and_noise_does_not_count() -> None:
    cheap, dear = order(GROUPED, 8.0, 0.0, OUTPUT), order(SEPARATE, 20.0, 15.0)
    assert best_order([cheap, dear], 100.0) is cheap
    assert best_order([dear], 100.0) is dear and best_order([dear], 300.0) is None
    assert best_order([order(SEPARATE, 5.0, 9.0)], 100.0) is None and best_order([], 1.0) is None


def recorded(name: str, dense_us: float, sparse_us: float) -> LayerPlan:
    """A layer of an MLP stack on an H200, 8192 tokens, 75 % pruned."""
    candidates = (Candidate(None, 0.0, 1.0, 1.0, dense_us), Candidate((64, 64), 0.75, 0.25, 0.515, sparse_us))
    return LayerPlan(name, "linear", (4096, 4096), (64, 64), 0.75, candidates=candidates, reason="fast")


MLP_STACK = ModelPlan((
    recorded("fc1", 1459.3, 544.5), recorded("fc2", 1387.3, 474.0),
    recorded("fc3", 1462.2, 532.5), recorded("fc4", 1387.9, 428.4),
))  # fmt: skip
NEEDED = {("fc1", INPUT): 0.1768, ("fc4", OUTPUT): 0.1784}
"""Of the blocks, with own orders of the network's inputs and outputs, which are fixed otherwise."""
MOVE_US = 81.1


def stack_options(plan: ModelPlan, move_us: float) -> dict[str, list[OwnOrder]]:
    return {
        name: [OwnOrder(dim, SEPARATE, 0.6, saved_us(plan[name], needed), move_us)]
        for (name, dim), needed in NEEDED.items()
    }


def test_fewer_blocks_save_no_more_than_the_dense_layer_lets_expect() -> None:
    fc1 = MLP_STACK["fc1"]
    in_proportion = 544.5 * (1 - 0.1768 / 0.25)  # 159 us; along the line from the dense layer 89
    assert saved_us(fc1, 0.1768) == pytest.approx((1459.3 - 544.5) / 0.75 * (0.25 - 0.1768))
    assert saved_us(fc1, 0.1768) < 0.6 * in_proportion
    assert saved_us(fc1, 0.25) == saved_us(fc1, 0.3) == 0.0
    alone = replace(fc1, candidates=fc1.candidates[1:])
    assert saved_us(alone, 0.1768) == pytest.approx(in_proportion)
    fast = recorded("", 5000.0, 544.5)  # further from dense than the blocks explain
    assert saved_us(fast, 0.1768) == pytest.approx(in_proportion)


def test_the_recorded_stack_moves_nothing_whatever_the_noise() -> None:
    """A run whose movements took 187 of 2298 us; the times scatter by 10 %, a movement's by 30 %."""
    assert within_share(MLP_STACK, stack_options(MLP_STACK, MOVE_US)) == MLP_STACK
    draw = random.Random(0)
    for _ in range(200):
        layers = [
            recorded(layer.name, *(c.time_us * draw.uniform(0.9, 1.1) for c in layer.candidates)) for layer in MLP_STACK
        ]
        noisy = ModelPlan(tuple(layers))
        assert within_share(noisy, stack_options(noisy, MOVE_US * draw.uniform(0.7, 1.3))) == noisy


def test_movements_together_stay_within_their_share() -> None:
    options = {name: [order(SEPARATE, 100.0, 12.0)] for name in ("fc1", "fc2", "fc3")}
    options["fc4"] = [order(SEPARATE, 90.0, 5.0), order(GROUPED, 60.0, 0.0, OUTPUT)]
    one = within_share(MLP_STACK, options)  # 19.8 us may go: 12 for the one that gains most, 5 for fc4
    assert [layer.input_order for layer in one] == [SEPARATE, SHARED, SHARED, SEPARATE]
    free = within_share(MLP_STACK, options, share=0.0)
    assert [layer.input_order for layer in free] == [SHARED] * 4 and free["fc4"].output_order == GROUPED
    assert within_share(MLP_STACK, {}) is MLP_STACK


def test_a_plan_says_which_order_and_why() -> None:
    layer = LayerPlan("fc", "linear", (64, 64), (16, 16), 0.7, reason="fast")
    own = with_order(layer, order(SEPARATE, 20.0, 5.0))
    assert (own.input_order, own.output_order) == (SEPARATE, SHARED)
    assert own.reason == "fast; separate order of inputs: saves 20.0 us, costs 5.0"
    assert with_order(layer, order(GROUPED, 20.0, 0.0, OUTPUT)).output_order == GROUPED
    assert with_order(layer, None) is layer
    plan = ModelPlan((own,))
    assert ModelPlan.from_json(plan.to_json()) == plan
    assert own.with_choice(None, 0.0).input_order == SHARED
    data = json.loads(plan.to_json())
    data["layers"][0]["input_order"] = "none"
    with pytest.raises(FileFormatError, match="input_order wants one of shared, grouped, separate; got 'none'"):
        ModelPlan.from_json(json.dumps(data))


@pytest.fixture
def torn() -> MLP:
    """Two layers that want opposite orders of the channels between them, the second one strongly."""
    torch.manual_seed(0)
    model = MLP(32, 64, 32)
    with torch.no_grad():
        strength = torch.ones(64)
        strength[torch.randperm(64)[:16]] = 8.0
        model.fc1.weight.mul_(strength[:, None])
        model.fc2.weight.mul_(strength.flip(0)[None] ** 2)
    return model.eval()


X = torch.randn(4, 32)


def planned(model: nn.Module) -> ModelPlan:
    layers = []
    for name, layer in prunable_layers(model).items():
        candidates = (Candidate(None, 0.0, 1.0, 1.0, 100.0), Candidate((8, 8), 0.75, 0.25, 0.5, 40.0))
        layers.append(LayerPlan(name, "linear", tuple(layer.weight.shape), (8, 8), 0.75, 1.0, (4, 32), candidates))
    return ModelPlan(tuple(layers), method="sort")


def decided(model: nn.Module, cost_us: float) -> ModelPlan:
    inputs = capture_inputs(model, X, prunable_layers(model))
    epilogues = dict.fromkeys(inputs, Epilogue())
    return own_orders(model, X, planned(model), OrderChooser(lambda shape: cost_us), inputs, epilogues)


def test_free_movements_are_taken_and_dear_ones_left(torn: MLP) -> None:
    assert decided(torn, 1e6) == planned(torn)
    free = decided(torn, 0.0)
    assert SEPARATE in {layer.input_order for layer in free} | {layer.output_order for layer in free}


def test_own_orders_retain_more_and_convert_moves_the_data(torn: MLP) -> None:
    plans = {"shared": planned(torn), "own": decided(torn, 0.0)}
    pruned = {k: tetris.prune(torn, plan=plan, method="sort", example_inputs=X) for k, plan in plans.items()}
    retained = {k: sum(r.retained for r in tetris.reorderings(model).values()) for k, model in pruned.items()}
    assert retained["own"] > retained["shared"] + 0.02
    fast = {k: tetris.convert(model, X, plan=plans[k]) for k, model in pruned.items()}
    moved = {k: [layer.name for layer in f.conversion.layers.values() if layer.permutes] for k, f in fast.items()}
    assert moved["shared"] == [] and moved["own"]
    assert all(tetris.verify(pruned[k], fast[k], X) for k in fast)


def test_grouped_outputs_move_in_whole_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1)).eval()
    x = torch.randn(1, 16, 6, 6)
    layer = LayerPlan("2", "conv2d", (64, 32, 1, 1), (8, 8), 0.5, output_order=GROUPED)
    plan = ModelPlan((LayerPlan("0", "conv2d", (32, 16, 3, 3), (8, 8), 0.5), layer))
    pruned = tetris.prune(model, plan=plan, method="sort", example_inputs=x)
    order = tetris.reorderings(pruned)["2"].permutations[0]
    assert torch.equal(order, expand(order[::GROUP] // GROUP, GROUP)) and not torch.equal(order, torch.arange(64))
    fast = tetris.convert(pruned, x, plan=plan)
    assert fast.conversion.layers["2"].permutes == "output" and tetris.verify(pruned, fast, x)


def test_grouped_is_offered_for_outputs_that_keep_their_order(torn: MLP) -> None:
    conv, x = nn.Sequential(nn.Conv2d(16, 128, 3)), torch.randn(1, 16, 6, 6)
    with torch.no_grad():  # heavy and light groups of outputs alternate; blocks hold two groups
        conv[0].weight.mul_(torch.tensor([9.0, 1.0] * 4).repeat_interleave(GROUP)[:, None, None, None])
    candidates = (Candidate(None, 0.0, 1.0, 1.0, 100.0), Candidate((32, 8), 0.5, 0.5, 0.5, 60.0))
    plan = ModelPlan((
        LayerPlan("0", "conv2d", (128, 16, 3, 3), (32, 8), 0.5, 1.0, (1, 16, 6, 6), candidates),
    ), method="sort")  # fmt: skip
    inputs = capture_inputs(conv, x, prunable_layers(conv))
    found = own_orders(conv, x, plan, OrderChooser(lambda shape: 1.0, stores_groups=lambda *layer: True), inputs, {})[
        "0"
    ]
    assert found.output_order == GROUPED and f"costs {GROUPED_COST:.1f}" in found.reason
    for slow in (OrderChooser(lambda shape: 1e6, stores_groups=lambda *layer: True), OrderChooser(lambda shape: 1e6)):
        assert own_orders(conv, x, plan, slow, inputs, {}) == plan


def test_the_hopper_convolution_stores_groups_unless_a_residual_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = nn.Conv2d(64, 128, 3, padding=1), LayerInput((8, 64, 28, 28), torch.float16, torch.device("cuda"), True)
    plan = LayerPlan("", "conv2d", (128, 64, 3, 3), (64, 32), 0.5)
    monkeypatch.setattr("tetris.autotune.own_orders.device_info", lambda device: H200)
    assert stores_groups(plan, conv, x, Epilogue("relu")) and not stores_groups(plan, conv, x, Epilogue(residual=True))
    assert not stores_groups(plan, nn.Conv2d(64, 100, 3), x, Epilogue())
    assert not stores_groups(plan, conv, replace(x, device=torch.device("cpu")), Epilogue())
    monkeypatch.setattr("tetris.autotune.own_orders.device_info", lambda device: A100)
    assert not stores_groups(plan, conv, x, Epilogue())


def test_stored_shapes() -> None:
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    x = capture_inputs(conv, torch.randn(2, 16, 9, 9), {"": conv})[""]
    assert output_shape(conv, x, False) == (2, 32, 5, 5) and output_shape(conv, x, True) == (2, 32, 2, 2)
    fc = nn.Linear(32, 8)
    assert output_shape(fc, capture_inputs(fc, X, {"": fc})[""], False) == (4, 8)


def test_movements_are_timed_once_a_shape() -> None:
    conv = nn.Conv2d(16, 32, 3)
    move = measured_moves(capture_inputs(conv, torch.randn(2, 16, 9, 9), {"": conv})[""], 3)
    assert move((2, 16, 9, 9)) > 0 and move((2, 16, 9, 9)) == move((2, 16, 9, 9)) and move((4, 64)) > 0
