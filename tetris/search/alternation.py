"""The outer loop of Algorithm 1: E-step, an M-step along each dimension, until nothing changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tetris.search.lanes import Lanes
from tetris.search.partition import Partition
from tetris.search.replay import Replayed
from tetris.search.system import Key, Part, System

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


class Alternation:
    """E- and M-steps in turn until the kept importance stops rising; it may be run again from other permutations.

    Problems that share no permutation are searched side by side, each until its own end. On a GPU an iteration is
    captured once and replayed, and only its E-step is waited for.
    """

    def __init__(self, system: System, keys: Sequence[Key], m_step: MStep, budget: Budget | None = None) -> None:
        """
        Args:
            system: its partitions change in place.
            keys: the reorderable dimensions (Omega), in the order of their M-steps.
            m_step: improves one partition for given values.
        """
        self._system, self._m_step, self._budget = system, m_step, budget or Budget()
        everything = system.parts(keys)
        self._parts = [part for part in everything if part.keys]
        self._fixed = [part for part in everything if not part.keys]
        device = system.problems[0].matrix.device
        self._replayed: Replayed | None = None
        if self._budget.seconds is None and self._parts and all(_is_plain(part) for part in self._parts):
            self._swaps = torch.zeros(len(self._parts), dtype=torch.int64, device=device)
            self._kept = torch.zeros(len(self._parts), dtype=torch.float64, device=device)
            self._replayed = Replayed(_iteration(self._parts, m_step, self._swaps, self._kept))

    def prepare(self) -> None:
        """Capture an iteration while the GPU is busy with something else."""
        if self._replayed is not None:
            self._replayed.prepare()
            self._forget()  # what a captured step makes is not there until it is replayed

    def run(self, progress: Progress | None = None, tolerance: float = 0.0) -> int:
        """Returns the number of swaps of all M-steps.

        ``tolerance``: the relative rise of what is kept that is not worth another iteration.
        """
        fixed = sum(part.system.expectation()[1] for part in self._fixed) if progress is not None else 0.0

        def report(step: int, kept: Sequence[float]) -> None:
            if progress is not None:
                progress(step, self._system.retained(fixed + sum(kept)))

        enough = 1 + tolerance
        return self._run(report, enough) if self._replayed is None else self._replay(self._replayed, report, enough)

    def _forget(self) -> None:
        for part in self._parts:
            part.system.forget()
        self._system.forget()

    def _run(self, report: Callable[[int, Sequence[float]], None], enough: float) -> int:
        swaps: int | torch.Tensor = 0
        kept, best, step = [0.0] * len(self._parts), [-1.0] * len(self._parts), 0
        rising = list(range(len(self._parts)))
        while True:
            masks = {}
            for i in rising:
                masks[i], kept[i] = self._parts[i].system.expectation()
            report(step, kept)
            rising = [i for i in rising if kept[i] > best[i] * enough]
            if not rising or self._budget.spent:
                return int(swaps)
            step += 1
            for i in rising:
                best[i] = kept[i]
                for key in self._parts[i].keys:
                    swaps = swaps + improve(self._parts[i].system, key, masks[i], self._m_step)
                    if self._budget.spent:
                        return int(swaps)

    def _replay(self, iteration: Replayed, report: Callable[[int, Sequence[float]], None], enough: float) -> int:
        """The same on a GPU. A part that has ended is set back to where it was: replays go on for the others."""
        self._swaps.zero_()
        best, rising, step, ends = [-1.0] * len(self._parts), list(range(len(self._parts))), 0, []
        while rising:
            iteration()
            kept = self._kept.tolist()  # before this iteration's M-steps
            report(step, kept)
            for i in rising:
                if kept[i] <= best[i] * enough:
                    ends.append((self._parts[i].system, self._parts[i].system.snapshot(), self._swaps[i].clone()))
            rising = [i for i in rising if kept[i] > best[i] * enough]
            best, step = kept, step + 1
        for system, orders, _ in ends:
            system.restore(orders)
        self._forget()
        return int(torch.stack([swaps for *_, swaps in ends]).sum())


def _iteration(parts: list[Part], m_step: MStep, swaps: torch.Tensor, kept: torch.Tensor) -> Callable[[], None]:
    """One iteration of all parts on a GPU: ``swaps`` [parts] rise, ``kept`` [parts] is that of the E-steps.

    A function, not a method: graphs in a cycle of references would be freed at any time.
    """
    lanes = Lanes([float(part.system.size) for part in parts], kept.device)

    def iterate(i: int) -> None:
        system, keys = parts[i]
        system.forget()  # a replay must not read what an earlier one left
        masks, now = system.heaviest_blocks()
        kept[i].copy_(now)
        for key in keys:
            swaps[i].add_(improve(system, key, masks, m_step))

    return partial(lanes, [partial(iterate, i) for i in range(len(parts))])


def alternate(
    system: System,
    keys: Sequence[Key],
    m_step: MStep,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> int:
    """Run an :class:`Alternation` once; returns the number of swaps."""
    return Alternation(system, keys, m_step, budget).run(progress)


def _is_plain(part: Part) -> bool:
    """Whether all is on a GPU and each partition has blocks of one size and serves every matrix once."""
    system, keys = part
    uniform = all(system.partitions[key].edge is not None and not system.shares_itself(key) for key in keys)
    return system.problems[0].matrix.is_cuda and uniform


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
