"""Importance of weights: what pruning keeps and reordering clusters. |W| as in the paper (L1), W^2 (L2) or your own."""

from __future__ import annotations

import math

import torch

from tetris.errors import ShapeError, TetrisError, describe

Importance = str | torch.Tensor
"""``"l1"``, ``"l2"`` or a tensor of the weight's shape with non-negative entries (gradients, Taylor terms, ...)."""


def importance_of(weight: torch.Tensor, importance: Importance = "l1") -> torch.Tensor:
    """Non-negative importance of every element of ``weight``, in fp32 (fp64 for fp64 weights), weight's shape.

    Raises:
        TetrisError: NaN or Inf in the weight or the importance, an unknown name, negative entries.
        ShapeError: an importance tensor of another shape.
    """
    weight = weight.detach()
    if weight.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(weight)):
        bad = int((~torch.isfinite(weight)).sum())
        raise TetrisError(
            f"importance: wanted finite weights; got {bad} NaN or Inf among {weight.numel()}; "
            "look for a diverged training run or a corrupt checkpoint"
        )
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if isinstance(importance, torch.Tensor):
        if importance.shape != weight.shape:
            raise ShapeError(f"importance: wanted the weight's shape {tuple(weight.shape)}; got {describe(importance)}")
        if not torch.isfinite(importance).all() or (importance < 0).any():
            raise TetrisError(
                "importance: wanted finite entries >= 0; got NaN, Inf or negative ones; "
                "pass |gradient * weight| or the like"
            )
        return importance.detach().to(weight)
    if importance == "l1":
        return weight.abs()
    if importance == "l2":
        return weight.square()
    raise TetrisError(f"importance: wanted 'l1', 'l2' or a tensor of the weight's shape; got {describe(importance)}")


def channel_importance(importance: torch.Tensor) -> torch.Tensor:
    """Summed over the kernel taps: [C_OUT, C_IN]. All that block pruning needs to know."""
    return importance.flatten(2).sum(2) if importance.dim() > 2 else importance
