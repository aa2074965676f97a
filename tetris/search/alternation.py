"""The outer loop of Algorithm 1: E-step, an M-step along each dimension, until nothing changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tetris.search.partition import Partition
from tetris.search.replay import Replayed
from tetris.search.system import Key, System

MStep = Callable[[torch.Tensor, Partition], "int | torch.Tensor"]
"""Improves a partition for given values [n, R] in place; returns how many swaps (or moves) that took, on a GPU perhaps
as a tensor that nobody has waited for."""

Progress = Callable[[int, float], None]
"""Called after every outer step with the number of steps done and the retained fraction so far."""


@dataclass
class Budget:
    """A wall-clock limit. ``None`` never runs out."""

    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def spent(self) -> bool:
        return self.seconds is not None and self.elapsed >= self.seconds


def alternate(
    system: System,
    keys: Sequence[Key],
    m_step: MStep,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> int:
    """Alternate E- and M-steps until the kept importance stops rising. On a GPU only an E-step is waited for.

    Args:
        system: its partitions change in place.
        keys: the reorderable dimensions (Omega), in the order of their M-steps.
        m_step: improves one partition for given values.
    Returns:
        the number of swaps of all M-steps.
    """
    budget = budget or Budget()
    if budget.seconds is None and _is_plain(system, keys):
        return _alternate_by_replay(system, keys, m_step, progress)
    swaps: int | torch.Tensor = 0
    step, best = 0, -1.0
    while True:
        masks, kept = system.expectation()
        if progress is not None:
            progress(step, system.retained(kept))
        if kept <= best or budget.spent:
            return int(swaps)
        best, step = kept, step + 1
        for key in keys:
            swaps = swaps + improve(system, key, masks, m_step)
            if budget.spent:
                return int(swaps)


def _is_plain(system: System, keys: Sequence[Key]) -> bool:
    """Whether all is on a GPU and each partition has blocks of one size and serves every matrix once."""
    uniform = all(system.partitions[key].edge is not None and not system.shares_itself(key) for key in keys)
    return system.problems[0].matrix.is_cuda and bool(keys) and uniform


def _alternate_by_replay(system: System, keys: Sequence[Key], m_step: MStep, progress: Progress | None) -> int:
    """The same on a GPU, every iteration a replay of the second one."""
    device = system.problems[0].matrix.device
    swaps = torch.zeros((), dtype=torch.int64, device=device)
    kept = torch.zeros((), dtype=torch.float64, device=device)

    def iteration() -> None:
        system.forget()  # a replay must not read what an earlier one left
        masks, now = system.heaviest_blocks()
        kept.copy_(now)
        for key in keys:
            swaps.add_(improve(system, key, masks, m_step))

    replayed, step, best = Replayed(iteration), 0, -1.0
    while True:
        replayed()
        now = float(kept)  # before this iteration's M-steps, which change nothing where it has not risen
        if progress is not None:
            progress(step, system.retained(now))
        if now <= best:
            system.forget()
            return int(swaps)
        best, step = now, step + 1


def improve(system: System, key: Key, masks: list[torch.Tensor], m_step: MStep) -> int | torch.Tensor:
    """One M-step (eq. 8) along ``key``; returns the number of swaps.

    Where a matrix has the same key on both sides its values are a linearisation: a step that lowers the kept importance
    is taken back.
    """
    partition = system.partitions[key]
    if not system.shares_itself(key):
        swaps = m_step(system.values(key, masks), partition)
    else:
        before, previous = _kept_under(system, masks), partition.order.clone()
        swaps = m_step(system.values(key, masks), partition)
        system.changed(key)
        if _kept_under(system, masks) <= before:
            partition.order.copy_(previous)
            swaps = 0
    system.changed(key)
    return swaps


def _kept_under(system: System, masks: list[torch.Tensor]) -> float:
    return sum(float((system.block_sums(i) * mask).sum(dtype=torch.float64)) for i, mask in enumerate(masks))
