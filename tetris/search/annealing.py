"""A mask that hardens slowly: the alternation of E- and M-steps without its local optima.

Algorithm 1 stops where no permutation improves on the mask that the permutation itself chose, and that happens early.
Here the E-step answers with a soft mask at temperature t,

    w = sigmoid((B - tau) / (t std(B))) * (1 + a t N(0, 1)),      B the block sums, tau such that the sigmoids sum to K,

so that blocks near the threshold still count, and the M-step re-splits every pair of groups once. t falls
geometrically; plain alternation with the hard mask finishes. The start is random: at a high temperature the beginning
is forgotten anyway. Neither colder ends nor more noise help; bench/NOTES.md has what was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from tetris.search.alternation import Budget, Progress
from tetris.search.batched import sweep
from tetris.search.lanes import Lanes
from tetris.search.replay import Replayed
from tetris.search.sums import processors, require_triton
from tetris.search.system import Key, System

HOTTEST, COLDEST, NOISE = 0.5, 0.1, 1.4
_SHARE_OF_BUDGET = 0.8
WARM = 0.2
"""Where a search starts that was given permutations: hot enough to escape, too cold to forget."""


@dataclass(frozen=True)
class Schedule:
    """How a search is annealed.

    Attributes:
        steps: temperatures.
        seed: of the start, the orders of play and the noise.
        hottest: the first temperature, in standard deviations of the block sums.
        shuffle: start from random permutations.
    """

    steps: int
    seed: int = 0
    hottest: float = HOTTEST
    shuffle: bool = True

    def temperature(self, done: float) -> float:
        """After so much of the way, 0 to 1."""
        return self.hottest * (COLDEST / self.hottest) ** done


@dataclass(frozen=True, eq=False)
class _Chain:
    """A system that shares no permutation with others, its keys, and its random numbers: the host's and the device's.

    They are its own, so that it anneals alike alone and beside others.
    """

    system: System
    keys: list[Key]
    draws: torch.Generator
    noise: torch.Generator


def soft_mask(
    block_sums: torch.Tensor, n_keep: int, temperature: float | torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The kept weight of every block, [R, C] float, for standard normal ``noise`` [R, C]; see the module.

    On a GPU the temperature is a float32 tensor [1] there.
    """
    if block_sums.is_cuda:
        require_triton("reorder")
        from tetris.kernels import soft_mask as kernels

        cores = processors(block_sums.device)
        return kernels.soft_mask(block_sums, noise, n_keep, torch.as_tensor(temperature), NOISE, processors=cores)
    spread = max(float(temperature) * float(block_sums.std(correction=0)), 1e-30)
    low, high = (float(extreme) for extreme in torch.aminmax(block_sums))
    low, high = low - 20 * spread, high + 20 * spread
    for _ in range(26):
        middle = (low + high) / 2
        if float(torch.sigmoid((block_sums - middle) / spread).sum()) > n_keep:
            low = middle
        else:
            high = middle
    return torch.sigmoid((block_sums - (low + high) / 2) / spread) * (1 + NOISE * temperature * noise)


def anneal(
    system: System,
    keys: Sequence[Key],
    schedule: Schedule,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> int:
    """Anneal all partitions of ``keys`` in place; follow with a hard alternation.

    Returns:
        the number of steps made; fewer than the schedule's where the budget is short, for which it cools faster.
    Cost:
        a step reads every matrix twice and every value about twice.
    """
    budget = budget or Budget()
    if not keys:
        return 0
    if _replays(system, budget):
        with annealing(system, keys, schedule, budget, progress):
            return schedule.steps
    chains, step, done = _chains(system, keys, schedule), 0, 0.0
    while done <= 1:
        for chain in chains:
            groups = {key: system.partitions[key].n_groups for key in chain.keys}
            players = {key: torch.randperm(n, generator=chain.draws) for key, n in groups.items()}
            _step(chain, schedule.temperature(done), players)
        step += 1
        if progress is not None:
            progress(step, system.retained(system.expectation()[1]))
        done = step / (schedule.steps - 1) if schedule.steps > 1 else 2.0
        if budget.seconds is not None:
            done = max(done, budget.elapsed / (_SHARE_OF_BUDGET * budget.seconds))
    return step


@contextmanager
def annealing(
    system: System,
    keys: Sequence[Key],
    schedule: Schedule,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Iterator[None]:
    """:func:`anneal` while the body runs: on a GPU on a stream of its own; otherwise after it, in the time left."""
    if not keys or not _replays(system, budget):
        yield
        anneal(system, keys, schedule, budget, progress)
        return
    beside = torch.cuda.Stream(system.problems[0].matrix.device)
    beside.wait_stream(torch.cuda.current_stream(beside.device))
    with torch.cuda.stream(beside):
        steps_in_use = _anneal_by_replay(system, keys, schedule, progress)
    try:
        yield
    finally:
        beside.synchronize()
        del steps_in_use  # their memory was, until now


def _replays(system: System, budget: Budget | None) -> bool:
    """Whether steps are captured and replayed; against the clock they are made one by one."""
    return system.problems[0].matrix.is_cuda and (budget is None or budget.seconds is None)


def _chains(system: System, keys: Sequence[Key], schedule: Schedule) -> list[_Chain]:
    """All that is annealed, its random start taken, which is the first of its random numbers."""
    device, chains = system.problems[0].matrix.device, []
    for part in system.parts(keys):
        if not part.keys:
            continue
        draws, noise = (torch.Generator(where).manual_seed(schedule.seed) for where in ("cpu", device))
        chains.append(_Chain(*part, draws, noise))
        if schedule.shuffle:
            for key in part.keys:
                partition = system.partitions[key]
                partition.order.copy_(torch.randperm(len(partition.order), generator=draws))
                system.changed(key)
    return chains


def _step(chain: _Chain, temperature: float | torch.Tensor, players: dict[Key, torch.Tensor]) -> None:
    """One temperature: for each key a soft E-step and a sweep. On a GPU nothing waits for it."""
    system, device = chain.system, chain.noise.device
    if device.type == "cuda" and not isinstance(temperature, torch.Tensor):
        temperature = torch.full((1,), temperature, device=device)
    for key in chain.keys:
        masks = []
        for index, problem in enumerate(system.problems):
            sums = system.block_sums(index)
            noise = torch.randn(sums.shape, generator=chain.noise, device=device, dtype=sums.dtype)
            masks.append(soft_mask(sums, problem.n_keep, temperature, noise))
        partition = system.partitions[key]
        if partition.n_groups > 1:
            values = system.values(key, masks, exact=False)
            sweep(values, partition, players[key].to(device), values.new_zeros(()))
            system.changed(key)


def _anneal_by_replay(system: System, keys: Sequence[Key], schedule: Schedule, progress: Progress | None) -> Replayed:
    """Queue all steps on the current stream. What differs between them lies on the GPU: temperatures, orders of play.

    Returns:
        the step, to be kept until the stream is through.
    """
    device, steps, chains = system.problems[0].matrix.device, schedule.steps, _chains(system, keys, schedule)
    temperatures = torch.tensor([schedule.temperature(k / max(1, steps - 1)) for k in range(steps)]).to(device)
    tables = {
        key: torch.rand(steps, system.partitions[key].n_groups, generator=chain.draws).argsort(1).to(device)
        for chain in chains
        for key in chain.keys
    }
    lanes = Lanes([float(chain.system.size) for chain in chains], device)
    at = torch.zeros(1, dtype=torch.int64, device=device)

    def step_of(chain: _Chain, temperature: torch.Tensor) -> None:
        chain.system.forget()  # a replay must not read what an earlier one left
        _step(chain, temperature, {key: tables[key].index_select(0, at).view(-1) for key in chain.keys})

    def step() -> None:
        temperature = temperatures.index_select(0, at)
        lanes([partial(step_of, chain, temperature) for chain in chains])
        at.add_(1)

    replayed = Replayed(step, [chain.noise for chain in chains])
    for done in range(steps):
        replayed()
        if progress is not None and done and done % max(1, steps // 20) == 0:
            system.forget()
            progress(done, system.retained(system.expectation()[1]))
    system.forget()
    return replayed
