"""The block-sparse convolutions that are measured, with the speedups over cuDNN that were set as goals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tetris.bench.cases import VGG16_CONVS, ConvCase


@dataclass(frozen=True)
class Case:
    """A layer, its block and its layout.

    Attributes:
        layer: the dense problem, batch and kept fraction included.
        block: sparsity block (out, in).
        layout: "random" or "reordered", see ``cases.LAYOUTS``.
        floor, target: speedups over cuDNN on dense random weights; NaN = none was set.
        dtype: "float16", "bfloat16" or "float32" (tf32).
        fused: with bias and ReLU. pool: and 2 x 2 max-pooling.
    """

    layer: ConvCase
    block: tuple[int, int]
    layout: str = "random"
    floor: float = math.nan
    target: float = math.nan
    dtype: str = "float16"
    fused: bool = False
    pool: bool = False

    @property
    def name(self) -> str:
        layer, block = self.layer, f"{self.block[0]}x{self.block[1]}"
        flags = (" bias relu" if self.fused else "") + (" pool" if self.pool else "")
        kind = "" if self.dtype == "float16" else f" {self.dtype}"
        return f"{layer.name} n{layer.batch} b{block} {layer.kept:.0%} {self.layout}{kind}{flags}"


def _layer(c_in: int, c_out: int, size: int, kept: float = 0.25, batch: int = 128, **geometry: int) -> ConvCase:
    return ConvCase(f"{c_in}-{c_out}@{size}", c_in, c_out, size, size, batch=batch, kept=kept, **geometry)


def _both(layer: ConvCase, block: tuple[int, int], floors: tuple[float, float], target: float) -> list[Case]:
    return [Case(layer, block, "random", floors[0], target), Case(layer, block, "reordered", floors[1], target)]


FLAGSHIP = _layer(512, 512, 28)
STRIDED = replace(_layer(256, 512, 56, 0.27, stride=2), name="256-512@56/2")
POINTWISE = replace(_layer(1024, 256, 14, 0.27, kernel_size=1, padding=0), name="1x1 1024-256@14")

CASES: tuple[Case, ...] = (
    *_both(FLAGSHIP, (64, 64), (3.4, 3.4), 3.8),
    *_both(FLAGSHIP, (64, 32), (3.4, 3.3), 3.8),
    *_both(FLAGSHIP, (64, 16), (2.7, 2.7), 3.5),
    *_both(_layer(256, 256, 56), (64, 32), (3.6, 3.5), 3.9),
    *_both(_layer(512, 512, 28, 0.27, 32), (64, 64), (2.9, 2.9), 3.5),
    *_both(_layer(512, 512, 14), (64, 64), (2.9, 2.9), 3.5),
    *_both(_layer(128, 128, 112), (64, 32), (3.0, 3.0), 3.5),
    *_both(_layer(64, 64, 224), (64, 16), (2.2, 2.2), 2.5),
    *_both(_layer(512, 512, 28, 0.27), (32, 32), (1.8, 1.8), 2.8),
    *_both(_layer(512, 512, 28, 0.27, 1), (64, 64), (1.0, 1.0), 1.6),
    *_both(_layer(512, 512, 28, 0.27, 8), (64, 64), (2.0, 2.0), 3.0),
    *_both(_layer(512, 512, 28, 0.5), (64, 64), (1.75, 1.75), 1.9),
    Case(_layer(512, 512, 28, 1.0), (64, 64), "random", 0.92, 1.0),
    *_both(STRIDED, (64, 64), (1.5, 1.5), 2.5),
    *_both(POINTWISE, (64, 64), (1.5, 1.5), 2.5),
    Case(FLAGSHIP, (64, 64), "random", 3.06, 3.5, dtype="bfloat16"),
    Case(FLAGSHIP, (64, 64), "random", 2.0, 3.0, dtype="float32"),
)
"""Every case with a goal. bfloat16's floor is 90 % of float16's."""

QUICK_CASES: tuple[Case, ...] = (
    Case(_layer(64, 64, 14, 0.5, 8), (64, 32), "random", fused=True),
    Case(_layer(64, 128, 12, 0.5, 16), (64, 16), "reordered", fused=True, pool=True),
)

POOLED = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
"""VGG16's layers that a 2 x 2 max-pool follows."""


def vgg16_cases(batch: int, block: tuple[int, int], layout: str = "reordered") -> tuple[Case, ...]:
    """VGG16's convolutions at the paper's pruning rates, each with its bias, ReLU and pooling.

    conv1_1 stays dense: three input channels, padded to one block.
    """
    cases = []
    for layer in VGG16_CONVS:
        first = layer.c_in == 3
        kept = replace(layer.at(batch), kept=1.0 if first else layer.kept)
        shape = (64, 16) if first else (min(block[0], layer.c_out), block[1])
        kind = "random" if first else layout
        cases.append(Case(kept, shape, kind, fused=True, pool=layer.name in POOLED))
    return tuple(cases)
