"""The search methods by name, for systems of blocked matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tetris.errors import TetrisError, describe
from tetris.search.alternation import Budget, Progress, alternate
from tetris.search.greedy import greedy
from tetris.search.system import Key, System


@dataclass(frozen=True)
class Options:
    """What a search is told besides the system: random seed, annealing steps, time budget, progress callback."""

    seed: int = 0
    steps: int = 60
    budget: Budget = field(default_factory=Budget)
    progress: Progress | None = None


@dataclass(frozen=True)
class Outcome:
    """Swaps (or moves) made, and the certificate of an exact search."""

    n_swaps: int = 0
    certificate: object | None = None


Method = Callable[[System, Sequence[Key], Options], Outcome]


def none(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Leave every slice where it is."""
    return Outcome()


def sort(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Slices in descending order of importance: costs nothing and gets much of the gain on trained weights."""
    for key in keys:
        totals = sum(
            system.problems[i].matrix.sum(1 - dim).view(-1, system.problems[i].repeats[dim]).sum(1)
            for i, dim in system.uses(key)
        )
        system.partitions[key].order.copy_(totals.sort(descending=True, stable=True).indices)
        system.changed(key)
    return Outcome()


def paper(system: System, keys: Sequence[Key], options: Options) -> Outcome:
    """Algorithm 1, the same swaps in the same order."""
    return Outcome(alternate(system, keys, greedy, options.budget, options.progress))


METHODS: dict[str, Method] = {"none": none, "sort": sort, "paper": paper}


def check_options(method: str, seed: int, steps: int, seconds: float | None, progress: Progress | None) -> Options:
    """The checked options of a search; raises TetrisError."""
    if method not in METHODS:
        raise TetrisError(f"reorder: wanted a method of {', '.join(METHODS)}; got {method!r}")
    if not isinstance(steps, int) or steps < 1:
        raise TetrisError(f"reorder: wanted steps >= 1; got {describe(steps)}")
    if seconds is not None and not seconds > 0:
        raise TetrisError(f"reorder: wanted seconds > 0 or None; got {describe(seconds)}")
    return Options(seed, steps, Budget(seconds), progress)
