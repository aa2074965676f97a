"""Weights, blocks and sparsities on which the searches are compared; all deterministic by seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tetris.bench.cases import VGG16_CONVS, VGG16_LINEARS, scaled_weight
from tetris.bench.trained import TRAINED, kept_weights, trained_weights

SQUARE = ((16, 16), (32, 32), (64, 64))
RECTANGULAR = ((64, 16), (64, 32), (128, 32))
SPARSITIES = (0.5, 0.73, 0.9)
CONTRAST = 0.7
"""Of planted blocks: everything outside them is multiplied by it."""


@dataclass(frozen=True, eq=False)
class ReorderCase:
    """One weight under one block and sparsity. ``ceiling``: what the planted blocks retain; None where none are."""

    matrix: str
    weight: torch.Tensor
    block: tuple[int, int]
    sparsity: float
    seed: int
    ceiling: float | None = None

    @property
    def name(self) -> str:
        return f"{self.matrix} {self.block[0]}x{self.block[1]} {self.sparsity:g} #{self.seed}"


def gaussian(size: int, seed: int) -> torch.Tensor:
    """Independent normal entries: the least structure there is."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def planted(size: int, block: tuple[int, int], sparsity: float, seed: int) -> tuple[torch.Tensor, float]:
    """A shuffled matrix with heavy blocks on a grid, and the retained fraction of exactly these blocks."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = size // block[0], size // block[1]
    heavy = torch.zeros(rows * columns, dtype=torch.bool)
    heavy[torch.randperm(rows * columns, generator=generator)[: round(rows * columns * (1 - sparsity))]] = True
    mask = heavy.view(rows, columns).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = torch.randn(size, size, generator=generator).abs() * torch.where(mask, 1.0, CONTRAST)
    row_order, column_order = (torch.randperm(size, generator=generator) for _ in range(2))
    return weight[row_order][:, column_order].contiguous(), float(weight[mask].sum() / weight.sum())


def quality_cases(
    device: str,
    seeds: int,
    quick: bool,
    matrices: list[str] | None = None,
    blocks: list[str] | None = None,
    trained_file: Path | None = None,
) -> list[ReorderCase]:
    """Planted, random and trained weights x blocks x sparsities; ``matrices`` and ``blocks`` choose among them.

    ``trained_file`` keeps the trained weights from one run to the next.
    """
    size = 128 if quick else 512
    sparsities = (0.73,) if quick else SPARSITIES
    wanted = ((16, 16), (32, 16)) if quick else SQUARE + RECTANGULAR
    cases = []
    for seed in range(2 if quick else 10):
        block = (16, 16) if quick else (32, 32)
        weight, ceiling = planted(size, block, 0.73, seed)
        cases.append(ReorderCase("planted", weight, block, 0.73, seed, ceiling))
    random = {"gaussian": gaussian, "heavy-tailed": lambda size, seed: scaled_weight((size, size), 1.0, seed)}
    drawn = [(name, make(size, seed), seed) for seed in range(seeds) for name, make in random.items()]
    if matrices is None or set(matrices) & set(TRAINED):
        trained = kept_weights(trained_file, device, quick) if trained_file else trained_weights(device, quick=quick)
        drawn += [(name, weight, 0) for name, weight in trained.items()]
    for block in wanted:
        for sparsity in sparsities:
            cases += [ReorderCase(name, weight, block, sparsity, seed) for name, weight, seed in drawn]
    return [
        case
        for case in cases
        if (matrices is None or case.matrix in matrices)
        and (blocks is None or f"{case.block[0]}x{case.block[1]}" in blocks)
    ]


def vgg16_layers() -> list[tuple[str, tuple[int, ...], float]]:
    """(layer, shape, sparsity) of VGG16's 16 layers at the paper's rates."""
    layers: list[tuple[str, tuple[int, ...], float]]
    layers = [(c.name, (c.c_out, c.c_in, 3, 3), 1 - c.kept) for c in VGG16_CONVS]
    return layers + [(c.name, (c.out_features, c.in_features), 1 - c.kept) for c in VGG16_LINEARS]


def vgg16_weights(sigma: float) -> list[tuple[str, torch.Tensor, float]]:
    """(layer, weight, sparsity); ``sigma`` as in :func:`scaled_weight`."""
    layers = enumerate(vgg16_layers())
    return [(name, scaled_weight(shape, sigma, seed), sparsity) for seed, (name, shape, sparsity) in layers]
