"""The errors a user meets: each says what was wanted, what came and what to do.

Every error is a ``ValueError`` too, so that callers who know nothing of Tetris still catch bad input.
"""

from __future__ import annotations

import torch


class TetrisError(ValueError):
    """Any error that Tetris raises on purpose."""


class ShapeError(TetrisError):
    """A tensor's shape (or a block's) does not fit the operation."""


class UnsupportedError(TetrisError):
    """A valid request that this version, device or layer type cannot serve."""


class FileFormatError(TetrisError):
    """A file is missing, corrupt, of another version or does not match what it is loaded into."""


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor, otherwise type and value; the "what came" part of a message."""
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{type(value).__name__} {value!r}"
