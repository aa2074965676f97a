"""Layers that nobody asked to prune: the vendor's kernel, or their dense weights on the block kernel.

A dense 1x1 convolution followed by a residual add and a ReLU is bound by memory; the block kernel with every block kept
does all of it in one pass where the vendor's convolution and a compiler's fused add take two. Measured, never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tetris.autotune.decide import choose_block
from tetris.autotune.measure import DenseLayer, Epilogue, LayerTimer, Measured
from tetris.autotune.problems import LayerInput
from tetris.plans import LayerPlan
from tetris.pruning import Block

FULL_BLOCKS: tuple[Block, ...] = ((64, 64), (128, 128))
"""With everything kept a block is only a tile: the two that the matrix units like best."""


def may_gain(device: torch.device, epilogue: Epilogue | None) -> bool:
    """Whether an unpruned layer is worth measuring: on a GPU, with something behind it to fuse."""
    return device.type == "cuda" and epilogue is not None and (epilogue.residual or epilogue.activation != "none")


@dataclass
class UnprunedLayers:
    """Decides on unpruned layers; equal layers on equal inputs are measured once.

    Attributes:
        timer: how layers are measured.
    """

    timer: LayerTimer
    _known: dict[object, Measured] = field(default_factory=dict)

    def decide(self, found: LayerPlan, layer: DenseLayer, x: LayerInput, epilogue: Epilogue | None) -> LayerPlan:
        """``found`` with measurements and a choice: dense, or in blocks at sparsity 0."""
        device = self.timer.device or x.device
        if not may_gain(device, epilogue):
            return replace(found, reason="dense: no sparsity was asked for it")
        case = (repr(layer), x.shape, x.dtype, epilogue)
        if case not in self._known:
            timer = replace(self.timer, blocks=FULL_BLOCKS, method="none")
            self._known[case] = timer.measure(layer, x, (0.0,), epilogue)
        measured = self._known[case]
        block, _, reason = choose_block(measured.candidates, 0.0)
        if block is not None:
            reason = "not pruned; with its epilogue fused the block kernel is faster"
        filled = replace(found, candidates=measured.candidates, failures=measured.failures)
        return filled.with_choice(block, 0.0, reason)
