"""The exact M-step against scipy's assignment solver, and its certificate."""

from __future__ import annotations

import pytest
import torch

from tetris.reordering import reorder
from tetris.search.partition import Partition
from tetris.search.transport import certify, exact, optimality_gap

optimize = pytest.importorskip("scipy.optimize")


def partition(n: int, edge: int) -> Partition:
    return Partition(torch.arange(n), torch.arange(0, n + edge, edge).clamp(max=n))


def kept(values: torch.Tensor, p: Partition) -> float:
    return float(values.gather(1, p.labels()[:, None]).sum())


@pytest.mark.parametrize(("n", "edge"), [(24, 4), (23, 4), (60, 7), (100, 10), (5, 5), (6, 1), (200, 16)])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "blocks"])
def test_exact_equals_the_assignment_solver(n, edge, kind):
    generator, p = torch.Generator().manual_seed(n), partition(n, edge)
    values = torch.randn(n, p.n_groups, generator=generator, dtype=torch.float64).abs()
    if kind == "ties":
        values = torch.randint(0, 3, values.shape, generator=generator).double()
    if kind == "blocks":
        values = values @ (torch.rand(p.n_groups, p.n_groups, generator=generator) < 0.3).double()
    cost = values[:, p.group_of_position()].numpy()
    rows, columns = optimize.linear_sum_assignment(cost, maximize=True)
    exact(values, p)
    assert torch.equal(p.order.sort().values, torch.arange(n))
    assert kept(values, p) == pytest.approx(cost[rows, columns].sum(), rel=1e-12)
    certificate = certify(values, p)
    assert certificate.is_optimal and certificate.kept == pytest.approx(kept(values, p))


def test_the_gap_bounds_what_is_missing():
    values, p = (
        torch.randn(60, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs(),
        partition(60, 10),
    )
    before = kept(values, p)
    solved = Partition(p.order.clone(), p.offsets)
    exact(values, solved)
    prices = certify(values, solved).prices
    assert optimality_gap(values, p.labels(), prices) == pytest.approx(kept(values, solved) - before)


def test_reorder_hands_out_certificates():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    r = reorder(weight, 16, 0.73, "exact")
    assert set(r.certificate) == {0, 1} and all(c.is_optimal for c in r.certificate.values())
    assert r.retained >= reorder(weight, 16, 0.73, "paper").retained
