"""Tetris: reorder channels, prune whole blocks, run the rest fast.

>>> import tetris
>>> pruned = tetris.prune(model, sparsity=0.73, example_inputs=x)   # masked copy, ready to fine-tune
>>> fast = tetris.convert(pruned, example_inputs=x)                  # block-sparse layers
>>> print(tetris.verify(pruned, fast, example_inputs=x))
"""

from __future__ import annotations

from tetris.conversion import Conversion, convert
from tetris.errors import FileFormatError, ShapeError, TetrisError, UnsupportedError
from tetris.graph import channel_groups
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.masking import bake_masks, masked_layers, prune, reorderings
from tetris.plans import LayerPlan, ModelPlan
from tetris.reordering import Reordering, reorder
from tetris.serialization import load, save
from tetris.verification import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "BlockLayout",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "Conversion",
    "FileFormatError",
    "LayerPlan",
    "ModelPlan",
    "Reordering",
    "ShapeError",
    "TetrisError",
    "UnsupportedError",
    "Verification",
    "bake_masks",
    "channel_groups",
    "convert",
    "load",
    "masked_layers",
    "plan",
    "prune",
    "reorder",
    "reorderings",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    """``tetris.plan`` measures, so it sits above this package; it is looked up when first asked for."""
    if name == "plan":
        from tetris.autotune.planner import plan

        return plan
    raise AttributeError(f"module 'tetris' has no attribute {name!r}")
