"""The searches' GPU paths: their kernels run in Triton's interpreter and must do what the compiled loops do."""

from __future__ import annotations

import gc
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from tests.support.fake_gpu import on_gpu
from tetris.errors import UnsupportedError
from tetris.search import alternation, annealing, batched, greedy, sums, transport
from tetris.search.alternation import Alternation, alternate
from tetris.search.annealing import NOISE, Schedule, anneal, soft_mask
from tetris.search.lanes import Lanes
from tetris.search.partition import Partition
from tetris.search.replay import Replayed
from tetris.search.system import BlockProblem, System

pytestmark = [
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real paths"),
]


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after the other: a grid barrier needs all in one."""
    for module in (sums, greedy, batched, transport, annealing):
        monkeypatch.setattr(module, "processors", lambda device: 1)
    monkeypatch.setattr("tetris.kernels.pair_split.RESIDENT_WARPS", 1)


def values_of(n: int, groups: int, high: int = 9) -> torch.Tensor:
    """Values whose sums and differences are exact."""
    return torch.randint(0, high, (n, groups), generator=torch.Generator().manual_seed(n)).double()


def blocks(n: int, edge: int) -> Partition:
    return Partition(torch.arange(n), torch.arange(0, n + edge, edge).clamp(max=n))


@pytest.mark.parametrize("dim", [0, 1])
def test_group_sums(dim: int) -> None:
    matrix, order = values_of(12, 10), torch.randperm([12, 10][dim], generator=torch.Generator().manual_seed(0))
    got = sums.group_sums(on_gpu(matrix), order, 4, dim)
    assert torch.equal(got.as_subclass(torch.Tensor), sums.group_sums(matrix, order, 4, dim))


def test_products_keep_float32_at_full_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5000, 7, generator=generator), torch.randn(7, 3, generator=generator)
    got = sums.product(on_gpu(left), right).as_subclass(torch.Tensor)
    assert torch.equal(got, (left.double() @ right.double()).float())


def test_greedy_makes_the_same_swaps() -> None:
    values, here, there = values_of(24, 6), blocks(24, 4), blocks(24, 4)
    traces = torch.full((2, 50, 2), -1)
    swaps = greedy.greedy(values, here, traces[0])
    assert greedy.greedy(on_gpu(values), there, traces[1]) == swaps > 0
    assert torch.equal(traces[0], traces[1]) and torch.equal(here.order, there.order)
    assert greedy.greedy(on_gpu(values), blocks(4, 4)) == 0


def test_greedy_leaves_unequal_groups_to_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = torch.tensor([0, 2, 7, 12])
    here, there = (Partition(torch.arange(12), offsets) for _ in range(2))
    values = values_of(12, 3)

    class Mixed(type(on_gpu(values))):  # type: ignore[misc]
        def cpu(self):
            return values

    assert greedy.greedy(values.as_subclass(Mixed), there) == greedy.greedy(values, here) > 0
    assert torch.equal(here.order, there.order)


def test_nothing_gains_where_there_is_nothing() -> None:
    assert greedy.smallest_gain(torch.empty(0, 3)) == 0 and greedy.smallest_gain(torch.ones(1, 1)) < 1e-5


def test_sweeps_make_the_same_swaps() -> None:
    values, here, there = values_of(24, 6), blocks(24, 4), blocks(24, 4)
    players, epsilon = torch.arange(6), values.new_zeros(())
    swaps = batched.sweep(values, here, players, epsilon)
    assert batched.sweep(on_gpu(values), there, players, epsilon) == swaps > 0
    assert torch.equal(here.order, there.order)


def test_batched_steps_leave_no_swap() -> None:
    values, here, there = values_of(24, 6), blocks(24, 4), blocks(24, 4)
    assert batched.batched(on_gpu(values), there) == batched.batched(values, here) > 0
    assert torch.equal(here.order, there.order) and greedy.greedy(values, here) == 0
    assert batched.batched(values, blocks(4, 4)) == 0


def test_exact_steps_reach_the_same_optimum_and_prove_it() -> None:
    values, here, there = values_of(24, 6, 1000), blocks(24, 4), blocks(24, 4)
    transport.exact(values, here)
    assert transport.exact(on_gpu(values), blocks(24, 4)) > 0
    moves, prices = transport.solve(on_gpu(values), there)
    kept = [float(values.gather(1, partition.labels()[:, None]).sum()) for partition in (here, there)]
    assert moves > 0 and kept[0] == kept[1]
    gap = transport.optimality_gap(values, there.labels(), prices.as_subclass(torch.Tensor))
    assert gap == pytest.approx(0, abs=1e-6) and transport.certify(values, here).is_optimal


def test_a_cycle_search_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_solve_on_cpu", lambda *arguments: (0, False, torch.zeros(6)))
    with pytest.raises(RuntimeError, match="did not end"):
        transport.solve(values_of(24, 6), blocks(24, 4))


def test_soft_masks_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    block_sums, noise = torch.rand(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    got = soft_mask(on_gpu(block_sums), 10, torch.tensor([0.2]), noise).as_subclass(torch.Tensor)
    torch.testing.assert_close(got, soft_mask(block_sums, 10, 0.2, noise), rtol=1e-3, atol=1e-4)
    still = soft_mask(block_sums, 10, 0.2, torch.zeros(6, 5))
    assert float(still.sum()) == pytest.approx(10, rel=1e-4) and NOISE > 0


class Replays:
    """A CUDA graph that runs its step again."""

    def __init__(self, step) -> None:
        self.replay = step


def test_replayed_steps_cool_down_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replayed annealing on CPU tensors, the graph replaced by its own step."""
    monkeypatch.setattr(Replayed, "_capture", lambda self: Replays(self._step))
    matrix = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).abs()
    system = System([BlockProblem(matrix, (8, 8), 6)])
    keys, seen = list(system.partitions), []
    before = system.retained(system.expectation()[1])
    annealing._anneal_by_replay(system, keys, Schedule(40), lambda step, kept: seen.append((step, kept)))
    assert [step for step, _ in seen] == list(range(2, 40, 2))
    assert system.retained(system.expectation()[1]) == pytest.approx(seen[-1][1], rel=0.1)
    assert seen[-1][1] > before
    for key in keys:
        order = system.partitions[key].order
        assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_a_replayed_alternation_is_the_alternation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replayed, "_capture", lambda self: Replays(self._step))
    matrix = torch.randint(0, 50, (40, 48), generator=torch.Generator().manual_seed(0)).double()
    here, there = (System([BlockProblem(matrix, (8, 8), 9)]) for _ in range(2))
    seen: list[list[float]] = [[], []]
    swaps = alternate(here, [0, 1], greedy.greedy, progress=lambda step, kept: seen[0].append(kept))
    monkeypatch.setattr(alternation, "_is_plain", lambda part: True)
    replayed = Alternation(there, [0, 1], greedy.greedy).run(lambda step, kept: seen[1].append(kept))
    assert replayed == swaps > 0 and seen[0] == seen[1] and len(seen[0]) > 3
    for key in (0, 1):
        assert torch.equal(here.partitions[key].order, there.partitions[key].order)


def test_a_captured_iteration_leaves_no_sums_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture runs the step's host code and nothing else: its tensors hold anything."""
    matrix = torch.rand(24, 16, generator=torch.Generator().manual_seed(0)).double()
    system = System([BlockProblem(matrix, (4, 4), 9)])

    def capture(self) -> Replays:
        orders = system.snapshot()
        self._step()
        for _, sums_of_groups in system._sums.values():
            sums_of_groups.fill_(torch.nan)
        for key, order in orders.items():
            system.partitions[key].order.copy_(order)
        return Replays(self._step)

    monkeypatch.setattr(Replayed, "_capture", capture)
    monkeypatch.setattr(alternation, "_is_plain", lambda part: True)
    before = system.block_sums(0).clone()
    search = Alternation(system, [0, 1], greedy.greedy)
    search.prepare()
    assert torch.equal(system.block_sums(0), before) and search.run() > 0


def test_a_tolerance_ends_the_alternation_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replayed, "_capture", lambda self: Replays(self._step))
    matrix = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).double()
    steps = {}
    for plain in (False, True):
        monkeypatch.setattr(alternation, "_is_plain", lambda part, plain=plain: plain)
        for tolerance in (0.0, 0.01):
            seen: list[float] = []
            search = Alternation(System([BlockProblem(matrix, (4, 4), 70)]), [0, 1], greedy.greedy)
            search.run(lambda step, kept, seen=seen: seen.append(kept), tolerance)
            steps[plain, tolerance] = seen
    assert steps[False, 0.0] == steps[True, 0.0] and steps[False, 0.01] == steps[True, 0.01]
    assert 2 < len(steps[True, 0.01]) < len(steps[True, 0.0]) and steps[True, 0.01][-1] < 1.01 * steps[True, 0.01][-2]


def test_replays_of_independent_systems_are_those_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replayed, "_capture", lambda self: Replays(self._step))
    monkeypatch.setattr(alternation, "_is_plain", lambda part: True)
    generator = torch.Generator().manual_seed(0)
    problems = [
        BlockProblem(torch.rand(shape, generator=generator).double(), (8, 8), 9, ((name, 0), (name, 1)))
        for name, shape in (("a", (40, 48)), ("b", (32, 64)))
    ]

    def searched(problems: list[BlockProblem]) -> tuple[int, dict]:
        system = System(problems)
        keys = list(system.partitions)
        annealing._anneal_by_replay(system, keys, Schedule(8), None)
        search = Alternation(system, keys, greedy.greedy)
        return search.run() + search.run(), system.snapshot()

    swaps, orders = searched(problems)
    alone = [searched([problem]) for problem in problems]
    assert swaps == sum(count for count, _ in alone) > 0
    assert all(torch.equal(order, orders[key]) for _, found in alone for key, order in found.items())


def test_nothing_is_freed_during_a_capture_which_always_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        def capture_begin(self, capture_error_mode) -> None:
            log.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append("replay")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    replayed = Replayed(lambda: log.append(f"step, collecting {gc.isenabled()}"))
    for _ in range(3):
        replayed()
    captured = ["begin relaxed", "step, collecting False", "end"]
    assert log == [*captured, "replay", "replay", "replay"] and gc.isenabled()
    log.clear()

    def fails() -> None:
        raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        Replayed(fails).prepare()
    assert log == ["begin relaxed", "end"] and gc.isenabled()


def test_lanes_share_the_tasks_fairly(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name) -> None:
            self.name, self.device = str(name), name

        def wait_stream(self, other) -> None:
            log.append(f"{self.name} waits for {other.name}")

    names, here = iter("bc"), Stream("a")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: log.append(stream.name) or nullcontext())
    side_by_side = Lanes([1, 9, 4, 4], torch.device("cuda"), most=3)
    side_by_side([lambda i=i: log.append(f"task {i}") for i in range(4)])
    assert log[:2] == ["b waits for a", "c waits for a"] and log[-2:] == ["a waits for b", "a waits for c"]
    assert log[2:-2] == ["a", "task 1", "b", "task 2", "c", "task 3", "b", "task 0"]
    log.clear()
    Lanes([1, 2], torch.device("cpu"))([lambda: log.append("one"), lambda: log.append("other")])
    assert log == ["one", "other"]


def test_annealing_without_partitions_makes_no_step() -> None:
    system = System([BlockProblem(torch.ones(8, 8), (4, 4), 2)])
    assert anneal(system, [], Schedule(5)) == 0


def test_processors_are_the_driver_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert sums.processors(torch.device("cuda")) == 132


def test_a_search_on_a_gpu_without_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match=r"reorder: wanted Triton .* weight\.cpu"):
        sums.group_sums(on_gpu(torch.ones(4, 4)), torch.arange(4), 2, 0)
