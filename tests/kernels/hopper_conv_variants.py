"""Compile-time variants of the Hopper convolution and the random problems that each of them can run.

A variant is what the compiler sees; shapes, layouts and schedules are run-time values. So a few dozen variants times
many random problems make a sweep of thousands of configurations with a few dozen compilations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.support.operands import ConvCase, conv2d_operands
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.hopper.conv2d import conv2d_schedule
from tetris.kernels.hopper.schedule import Schedule


@dataclass(frozen=True)
class Variant:
    """What one compilation fixes; ``extras`` as in :class:`ConvCase`; ``output_group`` > 0: outputs are permuted;
    ``takes``: programs take their tiles from one list."""

    block: tuple[int, int] = (64, 32)
    tile: tuple[int, int, int] = (8, 4, 8)
    tile_k: int = 0
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    input_order: str = "images"
    activation: str = "none"
    extras: tuple[str, ...] = ()
    max_pool: bool = False
    dtype: str = "float16"
    output_group: int = 0
    fetch: str = "lines"
    takes: bool = False

    def __str__(self) -> str:
        n, h, w = self.tile
        parts = [f"{self.block[0]}x{self.block[1]}", f"{n}x{h}x{w}", self.input_order, self.dtype, self.activation]
        flags = ["pool"] * self.max_pool + [f"groups{self.output_group}"] * (self.output_group > 0)
        flags += ["sectors"] * (self.fetch == "sectors") + ["takes"] * self.takes
        kernel = f"k{self.kernel_size}s{self.stride}p{self.padding}d{self.dilation}".replace(", ", "")
        return "-".join([*parts, kernel, *self.extras, *flags])

    @property
    def config(self) -> Conv2dConfig:
        n, h, w = self.tile
        return Conv2dConfig(
            kernel="hopper", tile_n=n, tile_h=h, tile_w=w, tile_k=self.tile_k, input_order=self.input_order,
            output_group=self.output_group, fetch=self.fetch,
        )  # fmt: skip

    def operands(self, case: ConvCase, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """The launcher's arguments but for config, dtypes and pooling, see :func:`conv2d_operands`."""
        made = conv2d_operands(case, getattr(torch, self.dtype), device, seed)
        if self.output_group:
            groups = torch.randperm(case.c_out // self.output_group, generator=torch.Generator().manual_seed(seed))
            channels = groups[:, None] * self.output_group + torch.arange(self.output_group)
            made["output_permutation"] = channels.reshape(-1).to(device)
        return made

    def schedule(self, case: ConvCase, operands: dict[str, Any], programs: int) -> Schedule:
        """The schedule of such operands, on their device; strips without blocks are filled however small the case."""
        geometry = {name: operands[name] for name in ("kernel_size", "stride", "padding", "dilation")}
        problem = Conv2dProblem(
            case.batch, case.c_in, case.c_out, case.height, case.width, block=case.block, dtype=self.dtype,
            n_blocks=len(operands["values"]), **geometry,
        )  # fmt: skip
        lists, fills = (operands["indptr"], operands["indices"]), "empty" in self.extras
        options = {"fills": fills, "cuts": not self.takes, "takes": self.takes}
        return conv2d_schedule(*lists, problem, self.config, programs, operands["x"].device, **options)

    def problem(self, generator: random.Random) -> ConvCase:
        """A random small problem of this variant: odd sizes, ragged channels, batches beside the tile's."""
        step = max(self.output_group, 8 if self.dtype != "float32" else 4)
        extent = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size)]
        least = [max(2, e - 2 * p + 1) for e, p in zip(extent, self.padding)]
        return ConvCase(
            c_out=step * generator.randint(1, 200 // step),
            c_in=8 * generator.randint(1, 25),
            block=self.block,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            batch=generator.randint(1, 2 * self.tile[0] + 3),
            height=generator.randint(least[0], least[0] + 18),
            width=generator.randint(least[1], least[1] + 18),
            kept=generator.choice((0.05, 0.3, 0.6, 1.0)),
            activation=self.activation,
            extras=self.extras,
        )


FUSED = ("bias", "residual")
BASE = Variant()
SMALL_BATCH = replace(BASE, tile=(1, 4, 16), input_order="copies")

VARIANTS: tuple[Variant, ...] = (
    BASE,
    replace(BASE, block=(64, 64), tile=(16, 4, 4)),
    replace(BASE, block=(64, 64), tile=(32, 4, 4), extras=("bias",), activation="relu"),
    replace(BASE, block=(64, 64), tile=(16, 7, 4), extras=FUSED, activation="relu"),
    replace(BASE, block=(64, 16), tile=(8, 8, 8), extras=("bias",)),
    replace(BASE, block=(128, 32), tile=(8, 4, 16), extras=FUSED, activation="silu"),
    replace(BASE, block=(128, 64), tile=(32, 7, 2), extras=FUSED, activation="gelu"),
    replace(BASE, block=(32, 32), tile=(16, 4, 4), extras=FUSED, activation="relu6"),
    replace(BASE, block=(32, 32), tile=(16, 4, 4), extras=("bias",), activation="relu", max_pool=True),
    replace(BASE, block=(64, 32), tile=(8, 8, 8), extras=("bias",), activation="relu", max_pool=True),
    replace(BASE, block=(64, 32), tile=(8, 4, 16), extras=FUSED, activation="silu", max_pool=True),
    replace(BASE, dtype="bfloat16", extras=FUSED, activation="relu"),
    replace(BASE, block=(64, 64), dtype="bfloat16", tile=(16, 7, 4)),
    replace(BASE, dtype="float32", tile=(16, 4, 4), extras=("bias",), activation="relu"),
    replace(BASE, dtype="float32", tile=(16, 4, 4), extras=FUSED),
    replace(BASE, stride=(2, 2), tile=(16, 4, 4), extras=FUSED, activation="relu"),
    replace(BASE, stride=(2, 1), tile=(8, 4, 8)),
    replace(BASE, stride=(1, 2), tile=(8, 4, 8)),
    replace(BASE, kernel_size=(1, 1), padding=(0, 0), block=(64, 64), tile=(16, 4, 4), extras=FUSED),
    replace(BASE, kernel_size=(1, 1), padding=(0, 0), stride=(2, 2), block=(64, 64), tile=(16, 4, 4)),
    replace(BASE, kernel_size=(5, 5), padding=(2, 2), tile_k=16),
    replace(BASE, kernel_size=(7, 7), padding=(3, 3), tile_k=16),
    replace(BASE, kernel_size=(2, 2), padding=(0, 1)),
    replace(BASE, kernel_size=(1, 3), padding=(0, 1)),
    replace(BASE, kernel_size=(3, 1), padding=(2, 0)),
    replace(BASE, dilation=(2, 2), padding=(2, 2), tile_k=16),
    replace(BASE, dilation=(3, 1), padding=(0, 2), tile_k=16),
    SMALL_BATCH,
    replace(SMALL_BATCH, tile=(1, 8, 8), block=(64, 64), extras=FUSED, activation="relu"),
    replace(SMALL_BATCH, tile=(2, 4, 8), dtype="bfloat16", extras=("bias",)),
    replace(SMALL_BATCH, tile=(1, 8, 8), extras=FUSED, activation="silu", max_pool=True),
    replace(SMALL_BATCH, tile=(1, 8, 16), extras=("bias",), activation="relu", max_pool=True),
    replace(SMALL_BATCH, tile=(1, 8, 32), block=(32, 32), extras=FUSED, activation="relu", max_pool=True),
    replace(SMALL_BATCH, tile=(1, 2, 32), kernel_size=(5, 5), padding=(2, 2), tile_k=16),
    replace(SMALL_BATCH, tile=(1, 4, 16), stride=(2, 2), tile_k=16),
    replace(BASE, block=(64, 64), tile=(32, 4, 4), extras=("bias",), activation="relu", output_group=8),
    replace(BASE, block=(32, 32), tile=(16, 4, 4), extras=("bias",), activation="relu", max_pool=True, output_group=16),
    replace(BASE, dtype="float32", tile=(16, 4, 4), output_group=4),
    replace(SMALL_BATCH, tile=(1, 8, 8), block=(128, 32), extras=("bias",), activation="gelu", output_group=16),
    replace(BASE, block=(64, 16), tile=(8, 8, 8), extras=("bias",), activation="relu", fetch="sectors"),
    replace(BASE, block=(64, 32), tile=(8, 8, 8), activation="relu", max_pool=True, fetch="sectors"),
    replace(BASE, block=(64, 32), tile=(16, 4, 8), extras=("bias", "empty"), activation="relu"),
    replace(BASE, block=(128, 32), tile=(8, 4, 16), extras=("empty",), activation="silu", max_pool=True),
    replace(BASE, block=(32, 32), tile=(16, 4, 4), extras=("bias", "empty"), activation="gelu", output_group=16),
    replace(BASE, block=(64, 64), dtype="float32", tile=(16, 4, 4), extras=("bias", "empty"), stride=(2, 2)),
    replace(BASE, block=(64, 64), tile=(16, 4, 4), extras=(*FUSED, "empty"), activation="relu"),
    replace(
        SMALL_BATCH,
        tile=(1, 8, 8),
        block=(64, 32),
        extras=("bias", "empty"),
        kernel_size=(5, 5),
        padding=(2, 2),
        tile_k=16,
    ),
    replace(BASE, block=(64, 16), tile=(8, 4, 16), extras=("bias",), activation="relu", fetch="sectors", takes=True),
    replace(BASE, block=(64, 32), tile=(16, 4, 8), extras=FUSED, activation="relu", takes=True),
    replace(BASE, block=(32, 32), tile=(16, 4, 4), extras=("bias",), max_pool=True, takes=True),
)
