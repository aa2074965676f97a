"""The kernels of the search against their definitions, on a GPU or in the interpreter with one program."""

from __future__ import annotations

import pytest
import torch

from tetris.layout import ceil_div
from tetris.search.greedy import greedy
from tetris.search.partition import Partition

pytestmark = pytest.mark.usefixtures("triton_kernels")

HAS_GPU = torch.cuda.is_available()


def integer_values(n: int, groups: int, high: int, seed: int) -> torch.Tensor:
    """Values whose sums and differences are exact; small ``high`` makes many ties."""
    return torch.randint(0, high, (n, groups), generator=torch.Generator().manual_seed(seed)).double()


def blocks(n: int, edge: int) -> Partition:
    return Partition(torch.arange(n), torch.arange(0, n + edge, edge).clamp(max=n))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("shape", "group"), [((7, 50), 3), ((33, 20), 8), ((5, 6), 6), ((20, 70), 25), ((5, 9000), 700)]
)
def test_group_sums(shape, group, dim, device):
    from tetris.kernels.group_sums import group_sums

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(1))
    labels = torch.empty_like(order)
    labels[order] = torch.arange(shape[dim]) // group
    expected_shape = [ceil_div(shape[d], group) if d == dim else shape[d] for d in (0, 1)]
    expected = torch.zeros(expected_shape, dtype=x.dtype).index_add(dim, labels, x)
    got = group_sums(x.to(device), order.to(device), group, dim=dim)
    assert torch.allclose(got.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "edge", "high"), [(24, 4, 1000), (24, 4, 5), (23, 4, 4), (40, 7, 9), (16, 8, 3), (5, 5, 9)]
)
def test_swap_search_makes_the_paper_s_swaps(n, edge, high, device):
    from tetris.kernels.swap_search import SwapSearchConfig, swap_search

    groups = ceil_div(n, edge)
    values = integer_values(n, groups, high, n)
    partition, expected = blocks(n, edge), torch.full((200, 2), -1)
    count = greedy(values, partition, expected)
    layouts = [SwapSearchConfig(8)] + ([SwapSearchConfig(1), SwapSearchConfig(2)] if HAS_GPU else [])
    for config in layouts:
        order = torch.arange(n, device=device)
        trace = torch.full((200, 2), -1, device=device)
        epsilon = torch.zeros((), dtype=values.dtype, device=device)
        swaps = swap_search(values.to(device), order, edge, epsilon, config=config, trace=trace)
        assert torch.equal(trace.cpu(), expected) and int(swaps[0]) == count
        assert torch.equal(order.cpu(), partition.order)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "edge", "groups_per_program"), [(512, 32, 16), (4096, 32, 1), (4100, 32, 4), (3000, 8, 8)]
)
def test_swap_search_makes_the_paper_s_swaps_at_full_size(n, edge, groups_per_program, device):
    from tetris.kernels.swap_search import SwapSearchConfig, swap_search

    values = integer_values(n, ceil_div(n, edge), 100, 0)
    partition, expected = blocks(n, edge), torch.full((20000, 2), -1)
    count = greedy(values, partition, expected)
    for dtype in (torch.float64, torch.float32):
        order, trace = torch.arange(n, device=device), torch.full((20000, 2), -1, device=device)
        config, epsilon = SwapSearchConfig(groups_per_program), torch.zeros((), dtype=dtype, device=device)
        swaps = swap_search(values.to(device, dtype), order, edge, epsilon, config=config, trace=trace)
        assert int(swaps[0]) == count and torch.equal(trace.cpu(), expected)


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after the other: pairs that wait for each other need all in one."""
    from tetris.kernels import pair_split

    if not HAS_GPU:
        monkeypatch.setattr(pair_split, "RESIDENT_WARPS", 1)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("n", "edge", "high"), [(24, 4, 1000), (24, 4, 5), (23, 4, 4), (40, 7, 9), (16, 8, 3)])
def test_tournament_matches_the_compiled_loops(n, edge, high, uniform, device, one_program):
    from tetris.kernels.pair_split import play_tournament
    from tetris.search.batched import sweep

    values = integer_values(n, ceil_div(n, edge), high, n)
    partition = blocks(n, edge)
    players = torch.randperm(partition.n_groups, generator=torch.Generator().manual_seed(2))
    epsilon = values.new_zeros(())
    swaps = sweep(values, partition, players, epsilon, 3, 5)
    operands = [t.to(device) for t in (values, torch.arange(n), partition.offsets, players)]
    made = play_tournament(*operands, 3, 5, epsilon.to(device), capacity=edge, processors=1, uniform=uniform)
    assert int(made) == swaps and torch.equal(operands[1].cpu(), partition.order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "n_keep", "high"), [(1, 1, 9), (70, 20, 1000), (70, 20, 3), (70, 70, 5), (300, 1, 2), (9000, 2500, 50)]
)
def test_hard_mask_keeps_the_largest_and_of_ties_the_first(n, n_keep, high, dtype, device):
    from tetris.kernels.hard_mask import hard_mask
    from tetris.pruning import keep_largest

    sums = torch.randint(0, high, (n,), generator=torch.Generator().manual_seed(n)).to(dtype) / 4
    mask, kept = hard_mask(sums.to(device), n_keep)
    assert torch.equal(mask.cpu(), keep_largest(sums, n_keep))
    assert float(kept) == float(sums[mask.cpu()].sum())


@pytest.mark.parametrize(
    ("shape", "n_keep", "temperature"),
    [((7, 9), 20, 0.5), ((3, 4), 12, 0.04), ((20, 30), 100, 0.1), ((110, 100), 3000, 0.1)],
)
def test_soft_mask_keeps_as_much_as_asked(shape, n_keep, temperature, device):
    from tetris.kernels import soft_mask as kernels
    from tetris.search.annealing import NOISE, soft_mask

    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(shape, generator=generator) * 5
    noise = torch.randn(shape, generator=generator)
    t = torch.tensor([temperature], device=device)
    cores = 132 if HAS_GPU else 1
    still = kernels.soft_mask(sums.to(device), noise.to(device), n_keep, t, 0.0, processors=cores)
    assert float(still.sum()) == pytest.approx(n_keep, rel=1e-3)
    noisy = kernels.soft_mask(sums.to(device), noise.to(device), n_keep, t, NOISE, processors=cores)
    assert torch.allclose(noisy.cpu(), soft_mask(sums, n_keep, temperature, noise), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "edge", "high"), [(24, 4, 1000), (23, 4, 4), (40, 7, 9), (16, 8, 3), (30, 3, 100)])
def test_cancelled_cycles_leave_an_optimum(n, edge, high, device):
    from tetris.kernels.cycle_cancel import cancel_cycles
    from tetris.search.transport import exact, optimality_gap

    values = integer_values(n, ceil_div(n, edge), high, n)
    partition = blocks(n, edge)
    exact(values, partition)
    best = float(values.gather(1, partition.labels()[:, None]).sum())
    order = torch.arange(n, device=device)
    tolerance = torch.full((), 1e-9, dtype=torch.float64, device=device)
    result, prices = cancel_cycles(values.to(device), order, edge, tolerance, processors=3 if HAS_GPU else 1)
    found = Partition(order.cpu(), partition.offsets)
    assert torch.equal(found.order.sort().values, torch.arange(n)) and int(result[2]) == 1
    assert float(values.gather(1, found.labels()[:, None]).sum()) == pytest.approx(best, abs=1e-6)
    assert optimality_gap(values, found.labels(), prices[result[1] % 2].cpu()) == pytest.approx(0, abs=1e-6)
