"""The configs that layers run with where nothing is tuned, for the ahead-of-time tests of the Hopper convolution."""

from __future__ import annotations

from itertools import product

from tests.kernels.hopper_conv_variants import Variant
from tetris.bench.cases import ConvCase
from tetris.bench.conv_cases import CASES, POOLED, Case, vgg16_cases
from tetris.kernels.configs import Conv2dProblem, DeviceInfo
from tetris.kernels.hopper.tile_choice import ranked_configs

H200 = DeviceInfo("H200", (9, 0), 132, "3.7.1")
BATCHES = (1, 2, 4, 8, 16, 32, 128)
BLOCKS = ((32, 32), (64, 16), (64, 32), (64, 64), (128, 64))


def problem(layer: ConvCase, block: tuple[int, int], dtype: str) -> Conv2dProblem:
    """A quarter of the blocks kept."""
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    n_blocks = max(1, layer.c_in * layer.c_out // (4 * block[0] * block[1]))
    return Conv2dProblem(
        layer.batch, max(8, layer.c_in), layer.c_out, layer.height, layer.width, (k, k), (s, s), (p, p), (1, 1), block,
        dtype, n_blocks,
    )  # fmt: skip


def default_variants() -> list[Variant]:
    """The distinct kernels of the first-ranked configs: every case with a goal and every layer of VGG16 with its
    pooling, at all batches and blocks."""
    every: list[Case] = [*CASES, *(case for block in BLOCKS for case in vgg16_cases(128, block))]
    found: dict[Variant, None] = {}
    for case, batch in product(every, BATCHES):
        layer = case.layer.at(batch)
        pool = case.fused and layer.name in POOLED
        ranked = ranked_configs(problem(layer, case.block, case.dtype), H200, max_pool=pool, allow_tf32=True)
        assert ranked, f"no config for {case.name} at batch {batch}"
        config = ranked[0]
        variant = Variant(
            block=case.block,
            tile=(config.tile_n, config.tile_h, config.tile_w),
            tile_k=config.tile_k,
            kernel_size=(layer.kernel_size,) * 2,
            stride=(layer.stride,) * 2,
            padding=(layer.padding,) * 2,
            input_order=config.input_order,
            activation="relu" if case.fused else "none",
            extras=("bias",) if case.fused else (),
            max_pool=pool,
            dtype=case.dtype,
        )
        found[variant] = None
    return list(found)
