"""Channels through ``torch.cat``: groups one after the other, searched together, folded on both sides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tetris
from tetris.bench.cases import scaled_weight
from tetris.channels import Channels, Member
from tetris.errors import ShapeError
from tetris.graph import channel_groups
from tetris.joint_reordering import Concatenation, JointProblem, reorder_jointly
from tetris.models import Concatenating
from tetris.permutation import apply
from tetris.pruning import block_sums
from tetris.specs import prunable_layers

METHODS = ("sort", "paper", "batched", "exact", "annealed")


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return scaled_weight((rows, columns), 0.8, seed).abs()


def problems() -> list[JointProblem]:
    """Two producers of 12 and 20 channels, a consumer of both (blocks of 8 straddle the boundary), one of the first."""
    both = Concatenation((("a", 12), ("b", 20)))
    return [
        JointProblem(matrix(12, 16, 0), (4, 4), 0.6, ("a", None)),
        JointProblem(matrix(20, 16, 1), (4, 4), 0.6, ("b", None)),
        JointProblem(matrix(24, 32, 2), (8, 8), 0.6, ("c", both)),
        JointProblem(matrix(16, 24, 3), (4, 8), 0.6, (None, "a"), (1, 2)),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_retained_is_what_the_orders_retain(method: str) -> None:
    given = problems()
    found = reorder_jointly(given, method, steps=20)
    for problem, layout, retained in zip(given, found.layouts, found.retained):
        orders = {
            dim: found.order(group, problem.importance.shape[dim] // repeats)
            for dim, (group, repeats) in enumerate(zip(problem.groups, problem.repeats))
        }
        if problem.repeats[1] == 2:
            orders[1] = (orders[1][:, None] * 2 + torch.arange(2)).flatten()
        sums = block_sums(apply(problem.importance, orders), layout.block)
        kept = float(sums[layout.to_mask()].sum() / sums.sum())
        assert retained == pytest.approx(kept, abs=1e-6)
    before = sum(reorder_jointly(given, "none").retained)
    assert sum(found.retained) > before + 0.1
    assert sorted(found.permutations["a"].tolist()) == list(range(12))


@pytest.mark.parametrize("method", ["paper", "exact"])
def test_a_concatenation_of_one_part_is_that_part(method: str) -> None:
    plain = [
        JointProblem(matrix(16, 24, 4), (4, 4), 0.5, ("r", "c")),
        JointProblem(matrix(24, 8, 5), (4, 4), 0.5, ("c", None)),
    ]
    single = [JointProblem(plain[0].importance, (4, 4), 0.5, ("r", Concatenation((("c", 24),)))), plain[1]]
    first, second = reorder_jointly(plain, method), reorder_jointly(single, method)
    assert torch.equal(first.permutations["c"], second.permutations["c"]) and first.retained == second.retained


def test_a_part_may_keep_its_order_or_come_twice() -> None:
    twice = Concatenation((("a", 8), (None, 8), ("a", 8)))
    found = reorder_jointly([JointProblem(matrix(16, 24, 6), (4, 4), 0.5, (None, twice))], "paper")
    order = found.order(twice, 24)
    assert torch.equal(order[8:16], torch.arange(8, 16)) and torch.equal(order[:8] + 16, order[16:])


def test_parts_must_fill_the_dimension() -> None:
    with pytest.raises(ShapeError, match="has 24 channels; its concatenation has 20"):
        reorder_jointly([JointProblem(matrix(16, 24, 6), (4, 4), 0.5, (None, Concatenation((("a", 20),))))])
    mismatched = [
        JointProblem(matrix(16, 24, 6), (4, 4), 0.5, (None, Concatenation((("a", 20), ("b", 4))))),
        JointProblem(matrix(16, 24, 6), (4, 4), 0.5, (None, "a")),
    ]
    with pytest.raises(ShapeError, match="'a' has 20 channels elsewhere; problem 1 has 24"):
        reorder_jointly(mismatched)


X = torch.randn(2, 3, 16, 16)


@pytest.fixture
def net() -> Concatenating:
    torch.manual_seed(0)
    model = Concatenating().eval()
    for index, layer in enumerate(prunable_layers(model).values()):
        layer.weight.data = scaled_weight(tuple(layer.weight.shape), 0.8, index) * 0.05
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.bias)
    return model


def test_groups_follow_one_another(net: Concatenating) -> None:
    graph = channel_groups(net, X)
    assert graph.inputs["dense.convs.2"] == Channels((1, 2, 3)) and graph.per_channel["dense.norms.1"] == Channels(
        (1, 2)
    )
    assert Member("dense.convs.2", "input", 1, 32) in graph.groups[2].members
    assert graph.inputs["head"] == Channels((6, 8, 9)) and graph.groups[8].size == 64
    assert all(group.fixed is None for group in graph.groups[1:10])
    assert "dense.convs.2 (in from 48)" in str(graph)


@pytest.mark.parametrize("method", ["sort", "paper"])
def test_concatenating_networks_move_nothing(net: Concatenating, method: str) -> None:
    pruned = tetris.prune(net, 0.6, block=8, method=method, example_inputs=X)
    fast = tetris.convert(pruned, X)
    assert [layer.name for layer in fast.conversion.layers.values() if layer.permutes] == []
    report = tetris.verify(pruned, fast, X)
    assert report.passed, str(report)
    original = tetris.prune(net, 0.6, block=8, method="none", example_inputs=X)
    retained = {name: r.retained for name, r in tetris.reorderings(pruned).items()}
    gains = [retained[name] - r.retained for name, r in tetris.reorderings(original).items()]
    assert sum(gains) / len(gains) > 0.05


def test_separate_permutations_of_concatenations_are_moved(net: Concatenating) -> None:
    pruned = tetris.prune(net, 0.6, block=8, method="sort", permutations="separate", example_inputs=X)
    fast = tetris.convert(pruned, X)
    assert "input" in fast.conversion.layers["transition"].permutes and tetris.verify(pruned, fast, X).passed


def test_saved_and_loaded(net: Concatenating, tmp_path) -> None:
    pruned = tetris.prune(net, 0.6, block=8, method="sort", example_inputs=X)
    fast = tetris.convert(pruned, X)
    loaded = tetris.load(tetris.save(fast, tmp_path / "net.safetensors"))
    torch.testing.assert_close(loaded(X), fast(X))


class Awkward(nn.Module):
    """Stacks along the batch, adds concatenations with different parts, and concatenates what has no order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 12, 1)
        self.e, self.f = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        stacked = torch.cat([self.a(x), self.b(x)], dim=0)
        uneven = torch.cat([self.c(x), self.d(x)], 1) + torch.cat([self.a(x), self.b(x)], 1)
        flat = torch.cat([self.e(x).flatten(1), self.f(uneven)[:, :, 0, 0]], 1)
        return stacked.sum((2, 3)), flat


def test_unusual_concatenations_fix_what_they_must() -> None:
    graph = channel_groups(Awkward(), torch.randn(2, 3, 4, 4))
    group = {m.module: g for g in graph.groups for m in g.members if m.role == "output"}
    assert group["a"] is group["b"]  # stacked along the batch they have one order, here a fixed one
    assert all("different parts" in str(group[name].fixed) for name in "cd") and group["a"].fixed is not None
    assert "may mix" in str(group["e"].fixed) and group["f"].fixed is not None
