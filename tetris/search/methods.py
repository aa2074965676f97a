"""The search methods by name, for systems of blocked matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tetris.errors import TetrisError, describe
from tetris.search.alternation import Alternation, Budget, Progress, alternate
from tetris.search.annealing import WARM, Schedule, anneal, annealing
from tetris.search.batched import batched as split_pairs
from tetris.search.greedy import greedy
from tetris.search.system import Key, Part, System
from tetris.search.transport import certify
from tetris.search.transport import exact as solve_exactly


@dataclass(frozen=True)
class Options:
    """What a search is told besides the system.

    Attributes:
        seed, steps: of the annealed search.
        budget, progress: time limit and callback.
        warm: whether the system's partitions are a start worth keeping, not just the identity.
    """

    seed: int = 0
    steps: int = 60
    budget: Budget = field(default_factory=Budget)
    progress: Progress | None = None
    warm: bool = False


@dataclass(frozen=True)
class Outcome:
    """Swaps (or moves) made, and the certificate of an exact search."""

    n_swaps: int = 0
    certificate: object | None = None


_LARGE = 256
_NOT_WORTH_A_STEP = 1e-5
"""Relative rise of what is kept at which the alternation after annealing ends: what is left would take longest."""

Method = Callable[[System, Sequence[Key], Options], Outcome]


def none(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Leave every slice where it is."""
    return Outcome()


def sort(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Slices in descending order of importance: costs nothing and gets much of the gain on trained weights."""
    for key in keys:
        totals = torch.stack(
            [
                system.problems[i].matrix.sum(1 - dim).view(-1, system.problems[i].repeats[dim]).sum(1)[units]
                for i, dim, units in system.uses(key)
            ]
        ).sum(0)
        system.partitions[key].order.copy_(totals.sort(descending=True, stable=True).indices)
        system.changed(key)
    return Outcome()


def paper(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Algorithm 1, the same swaps in the same order."""
    return Outcome(alternate(system, keys, greedy, options.budget, options.progress))


def batched(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """The alternation with M-steps that split disjoint pairs of groups together: twice as fast as the paper's swaps.

    It ends in another local optimum than the paper's method, as good on average and up to 12 % of its gain below in
    single cases. Only that method's own run would tell, which takes longer than this one: :func:`exact` and
    :func:`annealed` make it and are never below.
    """
    return Outcome(alternate(system, keys, split_pairs, options.budget, options.progress))


def exact(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """The alternation with optimal M-steps. It starts from the paper's answer, so that it is never below it.

    The certificate is {key: Certificate} for the final mask; absent when the time budget ran out before the end.
    """
    swaps = alternate(system, keys, greedy, options.budget, options.progress)
    swaps += alternate(system, keys, solve_exactly, options.budget, options.progress)
    if options.budget.spent:
        return Outcome(swaps)
    masks, _ = system.expectation()
    return Outcome(swaps, {key: certify(system.values(key, masks), system.partitions[key]) for key in keys})


def annealed(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Annealing, then hard alternation; never below the paper's answer from the same start, which it compares with.

    The last M-steps are exact, unless a dimension has more than 256 groups: there they would take longer than the
    annealing and add less than a thousandth.
    """
    budget, progress, parts = options.budget, options.progress, system.parts(keys)
    hard = Alternation(system, keys, greedy, budget)
    last = Alternation(system, [key for part in parts if _is_small(part) for key in part.keys], solve_exactly, budget)
    if options.warm:
        swaps = hard.run()
        to_beat = _found(system, keys)
        anneal(system, keys, Schedule(options.steps, options.seed, WARM, shuffle=False), budget, progress)
    else:
        beside = system.twin()
        with annealing(beside, keys, Schedule(options.steps, options.seed), budget, progress):
            swaps = hard.run()
            last.prepare()
        to_beat = _found(system, keys)
        system.restore(beside.snapshot())
    swaps += hard.run(tolerance=_NOT_WORTH_A_STEP)
    swaps += last.run(tolerance=_NOT_WORTH_A_STEP)
    parts = system.parts(keys)
    kept = _kept(parts)
    for part, (orders, before), now in zip(parts, to_beat, kept):
        if now < before:
            part.system.restore(orders)
    return Outcome(swaps)


def _is_small(part: Part) -> bool:
    return all(part.system.partitions[key].n_groups <= _LARGE for key in part.keys)


def _kept(parts: list[Part]) -> list[float]:
    """What the heaviest blocks of every part keep; a GPU is waited for once."""
    return torch.stack([part.system.heaviest_blocks()[1] for part in parts]).tolist()


def _found(system: System, keys: Sequence[Key]) -> list[tuple[dict[Key, torch.Tensor], float]]:
    """The orders of every part and what they keep."""
    parts = system.parts(keys)
    return [(part.system.snapshot(), kept) for part, kept in zip(parts, _kept(parts))]


METHODS: dict[str, Method] = {
    "none": none,
    "sort": sort,
    "paper": paper,
    "batched": batched,
    "exact": exact,
    "annealed": annealed,
}
"""The searches of :func:`tetris.reorder` by name; each changes the system's partitions of ``keys`` in place."""


def check_options(
    method: str, seed: int, steps: int, seconds: float | None, progress: Progress | None, warm: bool
) -> Options:
    """The checked options of a search; raises TetrisError."""
    if method not in METHODS:
        raise TetrisError(f"reorder: wanted a method of {', '.join(METHODS)}; got {method!r}")
    if not isinstance(seed, int):
        raise TetrisError(f"reorder: wanted an int as seed; got {describe(seed)}")
    if not isinstance(steps, int) or steps < 1:
        raise TetrisError(f"reorder: wanted steps >= 1; got {describe(steps)}")
    if seconds is not None and not seconds > 0:
        raise TetrisError(f"reorder: wanted seconds > 0 or None; got {describe(seconds)}")
    return Options(seed, steps, Budget(seconds), progress, warm)
