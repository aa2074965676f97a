"""The processes that tune together: who is who under torchrun, and the board where they divide the work.

Work is a list that every process knows; whoever is free claims the next item, so nobody waits for the slowest share.
The board is torchrun's own key-value store, or one within the process where there is only one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

TICK_SECONDS = 0.05


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
    """

    rank: int
    world: int
    board: Any

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
        return int(self.board.add(f"{kind} claimed", 1)) - 1

    def tally(self, kind: str, more: int = 0) -> int:
        """How many of a kind of work are done, ``more`` of them just now."""
        return int(self.board.add(f"{kind} done", more))

    def announce(self, name: str, text: str) -> None:
        """Put a text on the board, for good."""
        self.board.set(name, text)

    def heard(self, name: str) -> str | None:
        """The text of that name if it is on the board."""
        return self.board.get(name).decode() if self.board.check([name]) else None

    def wait_for(self, names: Iterable[str], meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        """The texts of all names as soon as they are there; ``meanwhile`` is called now and then."""
        wanted = list(names)
        while wanted and not self.board.check(wanted):
            meanwhile()
            time.sleep(TICK_SECONDS)
        return [self.board.get(name).decode() for name in wanted]

    def agree(self, name: str, mine: str) -> str:
        """The first process's text: what all go by."""
        if self.rank == 0:
            self.announce(name, mine)
        return self.wait_for([name])[0]
