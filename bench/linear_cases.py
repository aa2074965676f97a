"""The linear layers that are benched: those that the project sets itself goals for, and their neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tetris.bench.cases import LinearCase


@dataclass(frozen=True)
class Case:
    """A layer, its block, its layout and dtype. ``floor`` and ``target``: the speedups over cuBLAS set as goals."""

    layer: LinearCase
    block: tuple[int, int]
    layout: str = "random"
    floor: float = math.nan
    target: float = math.nan
    dtype: str = "float16"

    @property
    def name(self) -> str:
        layer = self.layer
        block = f"{self.block[0]}x{self.block[1]}"
        kind = "" if self.dtype == "float16" else f" {self.dtype}"
        return f"{layer.tokens} x {layer.name} b{block} {layer.kept:.0%} {self.layout}{kind}"


def square(tokens: int, kept: float = 0.27) -> LinearCase:
    """A transformer's projection of 4096 features."""
    return LinearCase("4096-4096", 4096, 4096, tokens, kept)


FC6 = LinearCase("25088-4096", 25088, 4096, 4096, 0.04)
UP = LinearCase("4096-14336", 4096, 14336, 1, 0.27)
DOWN = LinearCase("14336-4096", 14336, 4096, 8192, 0.10)
BOTH = ("random", "reordered")


def _large() -> list[Case]:
    """8192 tokens, every block shape, both layouts."""
    goals = {
        (64, 64): (2.4, 3.2),
        (32, 32): (1.7, 2.6),
        (128, 128): (2.9, 3.4),
        (128, 32): (2.5, 3.3),
        (128, 16): (2.5, 3.3),
    }
    cases = [Case(square(8192), block, layout, *goals[block]) for block in goals for layout in BOTH]
    return [*cases, Case(square(8192), (64, 64), "random", 2.4, 3.2, "bfloat16")]


def _few_tokens() -> list[Case]:
    """One to 1024 tokens; from 128 on the work of a layer no longer fills the GPU by itself."""
    cases = [Case(UP.at(tokens), (64, 64), "random", 2.2, 3.3) for tokens in (1, 16)]
    cases += [Case(FC6.at(128), (64, 64), layout, 5, 12) for layout in BOTH]
    cases += [Case(square(128), (64, 64), layout, 1.6, 2.8) for layout in BOTH]
    return cases + [Case(square(tokens), (64, 64), layout) for tokens in (256, 512, 1024) for layout in BOTH]


CASES: tuple[Case, ...] = (
    *_large(),
    *(Case(DOWN, (64, 64), layout, 6, 8) for layout in BOTH),
    *(Case(FC6, (64, 64), layout, 10, 18) for layout in BOTH),
    *_few_tokens(),
    Case(square(8192, 0.60), (64, 64), "random", 1.0),
    Case(square(8192, 0.90), (64, 64), "random", math.nan, 1.0),
    Case(square(8192, 1.00), (64, 64), "random"),
    *(Case(layer, (64, 64), layout) for layer in (FC6.at(1), square(1)) for layout in BOTH),
    *(Case(UP.at(tokens), (64, 64), "reordered", 2.2, 3.3) for tokens in (1, 16)),
)

QUICK_CASES: tuple[Case, ...] = (
    Case(LinearCase("256-256", 256, 256, 128, 0.27), (64, 64)),
    Case(LinearCase("256-256", 256, 256, 8, 0.27), (32, 32), "reordered"),
)
