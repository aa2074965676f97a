"""The processes that tune together: who is who under torchrun, and the board where they divide the work.

Work is a list that every process knows; whoever is free claims the next item, so nobody waits for the slowest share.
The board is torchrun's own key-value store, or one within the process where there is only one. What a process had
claimed when it died, another one takes over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tetris.errors import TetrisError

TICK_SECONDS = 0.05
LOST_SECONDS = 90.0
"""A process that gave no sign for so long is taken for dead; if it lives, some work is done twice. A sign is given
while waiting and between items of work, none of which takes that long."""


def local_gpu() -> str:
    """The GPU of this process: ``cuda:LOCAL_RANK`` under torchrun, otherwise ``cuda``."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def processes_here() -> int:
    """How many processes share this machine's processors."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Team:
    """This process and its board.

    Attributes:
        rank, world: this process and how many there are.
        board: a ``torch.distributed`` store; its calls come from any thread and never block for long.
        lost_seconds: after which silence means death.
    """

    rank: int
    world: int
    board: Any
    lost_seconds: float = LOST_SECONDS
    _signs: dict[int, tuple[int, float]] = field(default_factory=dict, compare=False)

    @staticmethod
    def alone() -> Team:
        """A team of one."""
        from torch.distributed import HashStore

        return Team(0, 1, HashStore())

    @staticmethod
    def of_torchrun() -> Team:
        """The team that torchrun started, or a team of one. Every process calls it equally often."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Team.alone()
        from torch.distributed import PrefixStore, rendezvous

        store, rank, world = next(rendezvous("env://"))
        meeting = store.add(f"tetris meetings of {rank}", 1)
        return Team(rank, world, PrefixStore(f"tetris meeting {meeting}", store))

    def claim(self, kind: str) -> int:
        """The next index of a kind of work that nobody has claimed: 0, 1, ..."""
        self.sign()
        index = int(self.board.add(f"{kind} claimed", 1)) - 1
        self.announce(f"{kind} {index} is of", str(self.rank))
        return index

    def inherit(self, kind: str, missing: Iterable[int]) -> list[int]:
        """Those of the missing items whose process is lost: they are this process's from now on."""
        lost, mine = [rank for rank in range(self.world) if self.is_lost(rank)], []
        for index in missing if lost else ():
            owner = int(self.heard(f"{kind} {index} is of") or self.rank)
            if owner in lost and self.board.add(f"{kind} {index} taken from {owner}", 1) == 1:
                self.announce(f"{kind} {index} is of", str(self.rank))
                mine.append(index)
        return mine

    def share(self, kind: str, names: list[str], meanwhile: Callable[[], None] = lambda: None) -> Iterator[int]:
        """The items of a kind of work that this process is to do, until all names are on the board.

        Args:
            names: under which the items' results are announced, in their order.
            meanwhile: called now and then while others work.
        """
        while (index := self.claim(kind)) < len(names):
            yield index
        while names and not self.board.check(names):
            yield from self.inherit(kind, self.missing(names))
            self.sign()
            meanwhile()
            time.sleep(TICK_SECONDS)

    def missing(self, names: list[str]) -> Iterator[int]:
        """Places of the names that are not on the board; looked up as they are asked for."""
        return (index for index, name in enumerate(names) if not self.board.check([name]))

    def sign(self) -> None:
        """Show that this process lives."""
        self.board.add(f"signs of {self.rank}", 1)

    def is_lost(self, rank: int) -> bool:
        """Whether a process that has given a sign gives none any more; asked again and again."""
        signs, now = int(self.board.add(f"signs of {rank}", 0)), time.monotonic()
        if rank not in self._signs or signs != self._signs[rank][0]:
            self._signs[rank] = (signs, now)
        return rank != self.rank and signs > 0 and now - self._signs[rank][1] > self.lost_seconds

    def tally(self, kind: str, more: int = 0) -> int:
        """How many of a kind of work are done, ``more`` of them just now."""
        return int(self.board.add(f"{kind} done", more))

    def announce(self, name: str, text: str) -> None:
        """Put a text on the board, for good."""
        self.board.set(name, text)

    def heard(self, name: str) -> str | None:
        """The text of that name if it is on the board."""
        return self.board.get(name).decode() if self.board.check([name]) else None

    def wait_for(self, names: Iterable[str], source: int | None = None) -> list[str]:
        """The texts of all names as soon as they are there.

        Args:
            source: the process that they come from, if from a single one.
        Raises:
            TetrisError: that process was lost.
        """
        wanted = list(names)
        while wanted and not self.board.check(wanted):
            self.sign()
            if source is not None and self.is_lost(source):
                raise TetrisError(f"process {source} of {self.world} was lost; start again, what was found is kept")
            time.sleep(TICK_SECONDS)
        return [self.board.get(name).decode() for name in wanted]

    def agree(self, name: str, mine: str) -> str:
        """The first process's text: what all go by."""
        if self.rank == 0:
            self.announce(name, mine)
        return self.wait_for([name], source=0)[0]
