"""The tensors of a benched linear layer, and the float64 result that they are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tetris.bench.cases import LAYOUTS
from tetris.bench.linear_cases import Case
from tetris.layout import BlockLayout
from tetris.packing import pack

CHECKED_TOKENS = 512
"""Rows of the result that are compared with float64; the first and the last ones, where tiles are incomplete."""


@lru_cache(maxsize=8)
def case_layout(kind: str, shape: tuple[int, int], block: tuple[int, int], kept: float, seed: int) -> BlockLayout:
    """A layout without empty rows on the CPU; several cases share one, and reordering a large weight takes seconds."""
    return LAYOUTS[kind](shape, block, kept, seed=seed).without_empty_rows()


@dataclass(frozen=True)
class Operands:
    """One case's tensors: x [tokens, in], the pruned weight, the packed blocks, and the float64 result of some rows."""

    layout: BlockLayout
    x: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    reference: torch.Tensor

    @staticmethod
    def of(case: Case, device: str, seed: int = 0) -> Operands:
        """Random operands; the layout of the case's kind."""
        layer, dtype = case.layer, getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shape = (layer.out_features, layer.in_features)
        layout = case_layout(case.layout, shape, case.block, layer.kept, seed)
        layout = BlockLayout(layout.shape, layout.block, layout.indptr.to(device), layout.indices.to(device))
        mask = layout.to_mask().repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
        dense = (normal(*shape) / layer.in_features**0.5).to(dtype)
        pruned = dense * mask[: shape[0], : shape[1]]
        x = normal(layer.tokens, layer.in_features).to(dtype)
        half = CHECKED_TOKENS // 2
        every = torch.arange(layer.tokens, device=device)
        rows = every if layer.tokens <= CHECKED_TOKENS else torch.cat([every[:half], every[-half:]])
        reference = x[rows].double() @ pruned.double().T
        return Operands(layout, x, dense, pruned, pack(pruned, layout), rows, reference)

    def dense_reference(self) -> torch.Tensor:
        """The float64 result of the same rows with the unpruned weight."""
        return self.x[self.rows].double() @ self.dense.double().T
