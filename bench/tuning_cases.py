"""The suites whose layers are tuned, as data, and how one of their layers is made."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tetris.autotune.problems import LayerInput, Problem
from tetris.autotune.tune_problems import Wanted
from tetris.bench.cases import (
    RESNET50_CONVS,
    TRANSFORMER_LINEARS,
    VGG16_CONVS,
    VGG16_LINEARS,
    ConvCase,
    LinearCase,
    random_layout,
    scaled_weight,
)
from tetris.files import write_text
from tetris.kernels.configs import Conv2dProblem, LinearProblem
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout
from tetris.pruning import fit_block
from tetris.reordering import reorder

FOLDER = "TETRIS_BENCH_LAYOUTS"
"""Environment variable: a folder that keeps the suites' layouts, which take longer to make than to search."""
CONV_BLOCK, LINEAR_BLOCK = (64, 32), (64, 64)
POOLED = {"conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"}


@dataclass(frozen=True)
class TuningCase:
    """One layer of a suite, at its batch and epilogue; its block is ``block`` or what fits into a smaller layer."""

    suite: str
    layer: ConvCase | LinearCase
    block: tuple[int, int]
    activation: str = "relu"
    max_pool: bool = False

    @property
    def name(self) -> str:
        return f"{self.suite} {self.layer.name}"

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.layer, ConvCase)

    @property
    def fitted_block(self) -> tuple[int, int]:
        """The block that the layer gets."""
        return fit_block(self.block, _channels(self.layer))

    def problem(self, n_blocks: int) -> Problem:
        """What ``wanted(...).problem`` is in float16 where so many blocks are stored."""
        case, (c_out, c_in) = self.layer, _channels(self.layer)
        if isinstance(case, LinearCase):
            return LinearProblem(case.tokens, c_in, c_out, self.fitted_block, "float16", n_blocks)
        kernel, stride, padding = case.kernel_size, case.stride, case.padding
        return Conv2dProblem(
            case.batch, c_in, c_out, case.height, case.width, (kernel, kernel), (stride, stride), (padding, padding),
            (1, 1), self.fitted_block, "float16", n_blocks,
        )  # fmt: skip

    def wanted(
        self, device: str, dtype: torch.dtype, layout_kind: str = "reordered", budget: int | None = None
    ) -> Wanted:
        """The layer with random values; ``layout_kind`` as in ``cases.LAYOUTS``, ``budget`` as for ``candidates``."""
        case, options = self.layer, {"activation": self.activation}
        (c_out, c_in), block = _channels(case), self.fitted_block
        kept = _layout((c_out, c_in), block, case.kept, device, layout_kind)
        taps = (case.kernel_size**2,) if isinstance(case, ConvCase) else ()
        values = torch.randn(kept.n_blocks, *taps, *block, device=device).to(dtype) / c_in**0.5
        more: dict[str, Any] = {"values": values, "layout": kept, **options}
        gpu = torch.zeros(0, device=device).device
        if isinstance(case, LinearCase):
            linear = BlockSparseLinear(c_in, c_out, block, kept.n_blocks, **more)
            return Wanted(self.name, linear, LayerInput((case.tokens, c_in), dtype, gpu, False), budget)
        conv = BlockSparseConv2d(
            c_in, c_out, (case.kernel_size,) * 2, block, kept.n_blocks, (case.stride,) * 2,
            (case.padding,) * 2, max_pool=self.max_pool, **more,
        )  # fmt: skip
        return Wanted(
            self.name, conv, LayerInput((case.batch, c_in, case.height, case.width), dtype, gpu, True), budget
        )


def _channels(case: ConvCase | LinearCase) -> tuple[int, int]:
    """Of the output and the input."""
    return (case.c_out, case.c_in) if isinstance(case, ConvCase) else (case.out_features, case.in_features)


@lru_cache(maxsize=64)
def _layout(shape: tuple[int, int], block: tuple[int, int], kept: float, device: str, layout_kind: str) -> BlockLayout:
    """A layout on the device; it is looked up in the folder of layouts, if there is one, and left there."""
    name = f"{layout_kind}-{shape[0]}x{shape[1]}-{block[0]}x{block[1]}-{kept:g}.json"
    path = Path(os.environ[FOLDER]) / name if FOLDER in os.environ else None
    if path is not None and path.exists():
        lists = json.loads(path.read_text())
    else:
        made = _made_layout(shape, block, kept, device, layout_kind)
        lists = [made.indptr.tolist(), made.indices.tolist()]
        if path is not None:
            write_text(path, json.dumps(lists))
    indptr, indices = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in lists)
    return BlockLayout(shape, block, indptr, indices)


def _made_layout(
    shape: tuple[int, int], block: tuple[int, int], kept: float, device: str, layout_kind: str
) -> BlockLayout:
    """Reordered on the device by sorting channels, as those of the network bench, or random."""
    if layout_kind == "random":
        return random_layout(shape, block, kept).without_empty_rows()
    weight = scaled_weight(shape, 0.5, device=device)
    return reorder(weight, block=block, sparsity=1 - kept, method="sort").layout.without_empty_rows()


def _vgg16(batch: int) -> list[TuningCase]:
    suite = f"vgg16 b{batch}"
    convs = [
        TuningCase(suite, layer.at(batch), CONV_BLOCK, max_pool=layer.name in POOLED)
        for layer in VGG16_CONVS
        if layer.c_in >= 16  # the first has its own kernel
    ]
    linears = [
        TuningCase(suite, layer.at(batch), LINEAR_BLOCK, "relu" if layer.name != "fc8" else "none")
        for layer in VGG16_LINEARS
    ]
    return convs + linears


SUITES: dict[str, tuple[TuningCase, ...]] = {
    "vgg16": tuple(_vgg16(128)),
    "vgg16-small": tuple(case for batch in (32, 8, 1) for case in _vgg16(batch)),
    "resnet50": tuple(TuningCase("resnet50 b128", layer.at(128), CONV_BLOCK) for layer in RESNET50_CONVS),
    "transformer": tuple(
        TuningCase(f"transformer {tokens} tokens", replace(layer, kept=0.27).at(tokens), LINEAR_BLOCK, "none")
        for tokens in (1, 16, 128, 512, 8192)
        for layer in TRANSFORMER_LINEARS
        if layer.name != "25088-4096"  # that is VGG16's
    ),
    "small": tuple(
        TuningCase("small", layer, (16, 16))
        for layer in (ConvCase("conv", 32, 32, 6, 6, batch=2, kept=0.5), LinearCase("fc", 64, 48, tokens=4, kept=0.5))
    ),
}
FULL = ("vgg16", "vgg16-small", "resnet50", "transformer")
QUICK = ("small",)
