"""The epilogue on a CPU: residual, activation and pooling of the freshly computed output, in place where possible."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.errors import TetrisError

MONOTONE = ("none", "relu", "relu6")
"""Activations that may follow the pooling instead of preceding it: then they touch a quarter of the elements."""


def finish_(y: torch.Tensor, residual: torch.Tensor | None, activation: str, *, max_pool: bool = False) -> torch.Tensor:
    """pool(activation(y + residual)) with 2x2 max-pooling or none; overwrites y."""
    if residual is not None:
        y.add_(residual)
    if max_pool and activation in MONOTONE:
        return activate_(F.max_pool2d(y, 2), activation)
    y = activate_(y, activation)
    return F.max_pool2d(y, 2) if max_pool else y


def activate_(y: torch.Tensor, activation: str) -> torch.Tensor:
    """y <- activation(y), in place; returns y."""
    if activation == "relu":
        return y.relu_()
    if activation == "relu6":
        return y.clamp_(0, 6)
    if activation == "silu":
        return F.silu(y, inplace=True)
    if activation == "gelu":
        return y.copy_(F.gelu(y))
    if activation != "none":
        raise TetrisError(f"activation: wanted none, relu, relu6, silu or gelu; got {activation!r}")
    return y
