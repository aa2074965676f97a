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

import torch

from tetris.search.alternation import Budget, Progress
from tetris.search.batched import sweep, turns_of_sweep
from tetris.search.replay import Replayed
from tetris.search.sums import processors, require_triton
from tetris.search.system import Key, System

HOTTEST, COLDEST, NOISE = 0.5, 0.1, 1.4
_SHARE_OF_BUDGET = 0.8
WARM = 0.2
"""Where a search starts that was given permutations: hot enough to escape, too cold to forget."""


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
    steps: int,
    seed: int,
    hottest: float = HOTTEST,
    shuffle: bool = True,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> int:
    """Anneal all partitions of ``keys`` in place, for ``steps`` temperatures; follow with a hard alternation.

    Args:
        hottest: the first temperature, in standard deviations of the block sums.
        shuffle: start from random permutations.
    Returns:
        the number of steps made; fewer than ``steps`` where the budget is short, for which it cools faster.
    Cost:
        a step reads every matrix twice and every value about twice.
    """
    budget = budget or Budget()
    if not keys:
        return 0
    if _replays(system, budget):
        with annealing(system, keys, steps, seed, hottest, shuffle, budget, progress):
            return steps
    draws = _draws(system, keys, seed, shuffle)
    generator = torch.Generator(system.problems[0].matrix.device).manual_seed(seed)
    step, done = 0, 0.0
    while done <= 1:
        players = {key: torch.randperm(system.partitions[key].n_groups, generator=draws) for key in keys}
        _step(system, keys, hottest * (COLDEST / hottest) ** done, players, generator)
        step += 1
        if progress is not None:
            progress(step, system.retained(system.expectation()[1]))
        done = step / (steps - 1) if steps > 1 else 2.0
        if budget.seconds is not None:
            done = max(done, budget.elapsed / (_SHARE_OF_BUDGET * budget.seconds))
    return step


@contextmanager
def annealing(
    system: System,
    keys: Sequence[Key],
    steps: int,
    seed: int,
    hottest: float = HOTTEST,
    shuffle: bool = True,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Iterator[None]:
    """:func:`anneal` while the body runs: on a GPU on a stream of its own; otherwise after it, in the time left."""
    if not keys or not _replays(system, budget):
        yield
        anneal(system, keys, steps, seed, hottest, shuffle, budget, progress)
        return
    beside = torch.cuda.Stream(system.problems[0].matrix.device)
    beside.wait_stream(torch.cuda.current_stream(beside.device))
    with torch.cuda.stream(beside):
        draws = _draws(system, keys, seed, shuffle)
        steps_in_use = _anneal_by_replay(system, keys, steps, seed, hottest, draws, progress)
    try:
        yield
    finally:
        beside.synchronize()
        del steps_in_use  # their memory was, until now


def _replays(system: System, budget: Budget | None) -> bool:
    """Whether steps are captured and replayed; against the clock they are made one by one."""
    return system.problems[0].matrix.is_cuda and (budget is None or budget.seconds is None)


def _draws(system: System, keys: Sequence[Key], seed: int, shuffle: bool) -> torch.Generator:
    """The host's random numbers, of which the random start takes the first."""
    draws = torch.Generator().manual_seed(seed)
    if shuffle:
        for key in keys:
            partition = system.partitions[key]
            partition.order.copy_(torch.randperm(len(partition.order), generator=draws))
            system.changed(key)
    return draws


def _step(
    system: System,
    keys: Sequence[Key],
    temperature: float | torch.Tensor,
    players: dict[Key, torch.Tensor],
    generator: torch.Generator,
) -> None:
    """One temperature: for each key a soft E-step and a sweep. On a GPU nothing waits for it."""
    device = system.problems[0].matrix.device
    if device.type == "cuda" and not isinstance(temperature, torch.Tensor):
        temperature = torch.full((1,), temperature, device=device)
    for key in keys:
        masks = []
        for index, problem in enumerate(system.problems):
            sums = system.block_sums(index)
            noise = torch.randn(sums.shape, generator=generator, device=device, dtype=sums.dtype)
            masks.append(soft_mask(sums, problem.n_keep, temperature, noise))
        partition = system.partitions[key]
        if partition.n_groups > 1:
            values, turns = system.values(key, masks, exact=False), turns_of_sweep(partition.n_groups)
            sweep(values, partition, players[key].to(device), 0, turns, values.new_zeros(()))
            system.changed(key)


def _anneal_by_replay(
    system: System,
    keys: Sequence[Key],
    steps: int,
    seed: int,
    hottest: float,
    draws: torch.Generator,
    progress: Progress | None,
) -> Replayed:
    """Queue all steps on the current stream. What differs between them lies on the GPU: temperatures, orders of play.

    Returns:
        the step, to be kept until the stream is through.
    """
    device = system.problems[0].matrix.device
    cooling = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    temperatures = (hottest * (COLDEST / hottest) ** cooling).float().to(device)
    tables = {
        key: torch.rand(steps, system.partitions[key].n_groups, generator=draws).argsort(1).to(device) for key in keys
    }
    generator, at = torch.Generator(device).manual_seed(seed), torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        system.forget()  # a replay must not read what an earlier one left
        players = {key: table.index_select(0, at).view(-1) for key, table in tables.items()}
        _step(system, keys, temperatures.index_select(0, at), players, generator)
        at.add_(1)

    replayed = Replayed(step, generator)
    for done in range(steps):
        replayed()
        if progress is not None and done and done % max(1, steps // 20) == 0:
            system.forget()
            progress(done, system.retained(system.expectation()[1]))
    system.forget()
    return replayed
