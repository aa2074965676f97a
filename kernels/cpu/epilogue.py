"""The epilogue on a CPU: residual and activation in place on the freshly computed output."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tetris.errors import TetrisError


def finish_(y: torch.Tensor, residual: torch.Tensor | None, activation: str) -> torch.Tensor:
    """y <- activation(y + residual), in place; returns y."""
    if residual is not None:
        y.add_(residual)
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
