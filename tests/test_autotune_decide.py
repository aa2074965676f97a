"""The planner's decisions on recorded measurements."""

from __future__ import annotations

import itertools
import random

import pytest

from tetris.autotune.decide import allocate, choose_block, options_of, time_at_retained
from tetris.errors import TetrisError
from tetris.plans import Candidate, LayerPlan


def dense(time_us: float = 100.0) -> Candidate:
    return Candidate(None, 0.0, 1.0, 1.0, time_us)


def at(block: int, sparsity: float, retained: float, time_us: float) -> Candidate:
    return Candidate((block, block), sparsity, 1 - sparsity, retained, time_us)


# Shaped like Figure 7 and the H200's measurements: small blocks are slow, large ones lose importance.
FIGURE_7 = [
    dense(680.0),
    at(16, 0.73, 0.62, 900.0),
    at(32, 0.73, 0.60, 530.0),
    at(64, 0.73, 0.57, 231.0),
    at(64, 0.70, 0.60, 256.0),
    at(128, 0.73, 0.48, 228.0),
    at(128, 0.60, 0.60, 330.0),
]


def test_critical_point_is_neither_the_smallest_nor_the_largest_block() -> None:
    block, sparsity, reason = choose_block(FIGURE_7, 0.73)
    assert (block, sparsity) == ((64, 64), 0.73)
    assert "2.66x" in reason and "128x128 2.06x" in reason


def test_importance_of_blocks_slower_than_dense_sets_no_goal() -> None:
    _, _, reason = choose_block(FIGURE_7, 0.73)
    assert "0.600" in reason  # 16x16 retains .62 but loses to dense


def test_dense_wins_where_no_block_beats_it_by_the_margin() -> None:
    block, sparsity, reason = choose_block([dense(10.0), at(32, 0.5, 0.9, 9.9), at(64, 0.5, 0.8, 12.0)], 0.5)
    assert block is None and sparsity == 0.0 and "dense wins" in reason and "1.01x" in reason


def test_ties_go_to_the_block_that_retains_more() -> None:
    block, _, _ = choose_block([dense(), at(32, 0.5, 0.8, 50.0), at(64, 0.5, 0.8 - 1e-6, 49.9)], 0.5)
    assert block == (32, 32)


def test_without_measurements_the_layer_stays_dense() -> None:
    assert choose_block([dense()], 0.5)[0] is None
    assert choose_block([at(32, 0.5, 0.8, 50.0)], 0.5)[0] == (32, 32)


def test_interpolation_meets_its_points_and_extends_them() -> None:
    points = [at(32, 0.8, 0.5, 40.0), at(32, 0.6, 0.7, 60.0), at(32, 0.5, 0.8, 80.0)]
    assert time_at_retained(points, 0.5) == 40.0 and time_at_retained(points, 0.8) == 80.0
    assert time_at_retained(points, 0.6) == pytest.approx(50.0)
    assert time_at_retained(points, 0.9) == pytest.approx(100.0)
    assert time_at_retained(points, 0.4) == pytest.approx(30.0)
    assert time_at_retained(points[:1], 0.9) == 40.0


def layer(name: str, importance: float, *candidates: Candidate) -> LayerPlan:
    return LayerPlan(name, "conv2d", (64, 64, 3, 3), importance=importance, candidates=candidates)


def test_efficient_choices_leave_out_the_dominated_and_the_slow() -> None:
    points = [at(32, 0.5, 0.9, 70.0), at(32, 0.6, 0.5, 69.0), at(64, 0.7, 0.6, 40.0), at(8, 0.9, 0.95, 130.0)]
    measured = layer("a", 1.0, dense(), *points)
    found = [(o.candidate.block, o.candidate.sparsity) for o in options_of(measured)]
    assert found == [(None, 0.0), ((32, 32), 0.5), ((64, 64), 0.7)]


def random_layers(seed: int, n: int) -> list[LayerPlan]:
    rng = random.Random(seed)
    layers = []
    for i in range(n):
        base = rng.uniform(20, 200)
        points = [
            at(b, s, 1 - s ** rng.uniform(1.5, 4), base * ((1 - s) * rng.uniform(1, 1.5) + rng.uniform(0, 0.3)))
            for b in (32, 64)
            for s in (0.5, 0.7, 0.9)
        ]
        layers.append(layer(f"l{i}", rng.uniform(1, 10), dense(base), *points))
    return layers


def totals(layers: list[LayerPlan]) -> tuple[float, float]:
    chosen = [layer.chosen for layer in layers]
    return sum(c.time_us for c in chosen), sum(layer.importance * (1 - c.retained) for layer, c in zip(layers, chosen))


@pytest.mark.parametrize("seed", range(8))
def test_target_is_met_close_to_the_least_possible_loss(seed: int) -> None:
    layers = random_layers(seed, 4)
    limit = sum(layer.dense.time_us for layer in layers) / 1.8
    time, loss = totals(allocate(layers, target_speedup=1.8))
    assert time <= limit * (1 + 1e-12)
    choices = [[(c.time_us, layer.importance * (1 - c.retained)) for c in layer.candidates] for layer in layers]
    least = min(
        sum(loss for _, loss in combination)
        for combination in itertools.product(*choices)
        if sum(time for time, _ in combination) <= limit
    )
    step = max(o.loss - h[i].loss for h in map(options_of, layers) for i, o in enumerate(h[1:]))
    assert least - 1e-9 <= loss <= least + step


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.1, 0.3])
def test_loss_budget_is_kept_and_more_budget_is_never_slower(budget: float) -> None:
    layers = random_layers(1, 6)
    total = sum(layer.importance for layer in layers)
    time, loss = totals(allocate(layers, max_importance_loss=budget))
    assert loss <= budget * total
    assert totals(allocate(layers, max_importance_loss=budget + 0.1))[0] <= time


def test_nothing_asked_changes_nothing() -> None:
    layers = allocate(random_layers(2, 3), target_speedup=1.0)
    assert all(layer.block is None for layer in layers)


def test_no_layer_is_ever_slower_than_dense() -> None:
    slow = layer("slow", 1.0, dense(), at(32, 0.9, 0.5, 120.0))
    quick = layer("quick", 1.0, dense(), at(32, 0.9, 0.5, 20.0))
    first, second = allocate([slow, quick], max_importance_loss=0.9)
    assert first.block is None and "dense wins" in first.reason
    assert second.block == (32, 32)


def test_impossible_and_unclear_budgets_are_refused() -> None:
    layers = random_layers(3, 3)
    with pytest.raises(TetrisError, match="reach"):
        allocate(layers, target_speedup=100.0)
    with pytest.raises(TetrisError, match="exactly one"):
        allocate(layers)
    with pytest.raises(TetrisError, match="exactly one"):
        allocate(layers, target_speedup=2.0, max_importance_loss=0.1)
    with pytest.raises(TetrisError, match="no dense"):
        allocate([layer("x", 1.0, at(32, 0.5, 0.5, 1.0))], target_speedup=2.0)
