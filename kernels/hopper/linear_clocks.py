"""What a launch of the Hopper linear kernel takes: an estimate from its tasks, to choose cuts, tiles and order by."""

from __future__ import annotations

from dataclasses import dataclass

from tetris.kernels.splitting import PartCosts

STRIP = 64
STAGE_K = 64


@dataclass(frozen=True)
class LinearClocks:
    """Clocks of an H200's multiprocessor, fitted to 75 launches with tiles of 128 and 256 tokens (bench/NOTES.md).

    Attributes:
        launch: an empty kernel, descriptors, the first tile from a cold L2 and the last store.
        byte_rate: bytes of tiles a clock that one multiprocessor takes in; together_rate: while all of them do, evenly.
        row: of the copy engine for a row of a tile, however short.
        product: one strip x one token x 64 inputs on the matrix unit; 2 at its peak.
        task, token: of a task beside its stages, and of its epilogue for a token.
        arrive: fence and counter of a piece of a cut pair.
        leave_rate, merge_rate: bytes a clock at which a piece stores its sums, and the last one reads each of them.
        memory_rate: bytes a clock that the memory delivers and takes.
    """

    launch: float = 11893.0
    byte_rate: float = 53.5
    together_rate: float = 58.7
    row: float = 1.7
    product: float = 2.46
    task: float = 604.0
    token: float = 2.59
    arrive: float = 5007.0
    leave_rate: float = 17.8
    merge_rate: float = 42.0
    memory_rate: float = 1884.0

    def of_stages(self, stages: int, weight_tiles: int, tile_k: int, x_tiles: int, tile_tokens: int) -> float:
        """A task's stages: the longest of fetching bytes, fetching rows and multiplying.

        Args:
            weight_tiles: kept ones of ``tile_k`` inputs; x_tiles: of every stage.
        """
        size = stage_bytes(stages, weight_tiles, tile_k, tile_tokens)
        rows = stages * tile_tokens * x_tiles + weight_tiles * STRIP
        multiply = self.product * tile_tokens * weight_tiles * tile_k / STAGE_K
        return max(size / self.byte_rate, self.row * rows, multiply)

    def part_costs(self, tile_tokens: int) -> PartCosts:
        """What tasks cost beside their stages, for cutting pairs."""
        sums = 2 * STRIP * tile_tokens * 4
        merge = sums / self.merge_rate
        return PartCosts(self.task + self.token * tile_tokens, self.arrive + sums / self.leave_rate - merge, merge)

    def of_launch(self, busiest: float, fetched_bytes: float, memory_bytes: float) -> float:
        """The estimate of a launch, whatever bounds it; what comes near to that adds to it.

        Args:
            busiest: clocks of the program that has most to do.
            fetched_bytes: of tiles, by a multiprocessor on average; memory_bytes: moved in all.
        """
        bounds = (busiest, fetched_bytes / self.together_rate, memory_bytes / self.memory_rate)
        return self.launch + float(sum(bound**4 for bound in bounds)) ** 0.25


def stage_bytes(stages: int, weight_tiles: int, tile_k: int, tile_tokens: int) -> int:
    """Bytes of the input tiles of so many stages and of their kept weight tiles."""
    return 2 * (stages * tile_tokens * STAGE_K + weight_tiles * STRIP * tile_k)
