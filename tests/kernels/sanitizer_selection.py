"""Small launches of the Hopper kernels and of the search's for compute-sanitizer: it slows kernels a thousandfold.

    python -m tests.kernels.sanitizer_selection conv    # compiles
    compute-sanitizer --tool memcheck  python -m tests.kernels.sanitizer_selection conv
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitizer_selection linear
    compute-sanitizer --tool memcheck  python -m tests.kernels.sanitizer_selection search
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitizer_selection roles   # what is Triton's own

Hopper programs run several tiles each on rings that wrap around, with and without an epilogue. Every result is compared
with float64, a search's with the CPU's; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from tests.kernels import search_selection
from tests.kernels.hopper_conv_variants import VARIANTS, Variant
from tests.support.operands import ConvCase, LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import LinearConfig, LinearProblem
from tetris.kernels.hopper.narrow_linear_schedule import TILE_OUT
from tetris.kernels.linear_paths import linear_launcher, linear_schedule
from tetris.tolerances import relative_error, tolerance

PROGRAMS = 3
"""Few, so that each of them walks several tiles."""
CONV_VARIANTS = {2: PROGRAMS, 8: PROGRAMS, 15: PROGRAMS, 35: PROGRAMS, 41: PROGRAMS, 46: 32}
"""Of ``hopper_conv_variants``: tall tiles, pairs of rows with pooling, stride 2, permuted channels, rows without blocks
and tiles cut into pieces."""
LINEAR_BLOCKS = ((64, 64), (64, 16), (128, 32), (32, 32))
NARROW_BLOCKS = ((32, 32), (128, 16))


def conv_error(variant: Variant, programs: int) -> float:
    """The relative error of one small launch."""
    from tetris.kernels.hopper.conv2d import block_sparse_conv2d

    size = 4 * variant.stride[0] * 2
    case = ConvCase(
        128, 128, variant.block, variant.kernel_size, variant.stride, variant.padding, variant.dilation,
        variant.tile[0], size, size, 0.5, variant.activation, variant.extras,
    )  # fmt: skip
    operands = variant.operands(case, torch.device("cuda"))
    schedule = variant.schedule(case, operands, programs)
    y = block_sparse_conv2d(
        **operands, allow_tf32=True, max_pool=variant.max_pool, config=variant.config, schedule=schedule
    )
    expected = reference.block_sparse_conv2d(**operands)
    return relative_error(y, torch.nn.functional.max_pool2d(expected, 2) if variant.max_pool else expected)


def linear_error(block: tuple[int, int], extras: tuple[str, ...], config: LinearConfig) -> float:
    """The relative error of one small launch."""
    few = {"vector": (1, 4096, 132), "split": (40, 4096, 132)}  # programs for which rows are cut
    tokens, in_features, programs = few.get(config.kernel, (300, 256, PROGRAMS))
    case = LinearCase(448, in_features, block, (tokens,), 0.5, "relu", extras)
    operands = linear_operands(case, torch.float16, torch.device("cuda"))
    problem = LinearProblem(tokens, in_features, 448, block, "float16", len(operands["values"]))
    schedule = linear_schedule(problem, config, operands["indptr"], operands["indices"], programs)
    assert schedule is not None
    y = linear_launcher(config.kernel)(**operands, config=config, schedule=schedule.tensors)
    return relative_error(y, reference.block_sparse_linear(**operands))


def linear_kinds() -> list[tuple[tuple[int, int], tuple[str, ...], LinearConfig]]:
    """Blocks, epilogues and kernels."""
    wide = [LinearConfig(kernel="hopper", tile_tokens=256)]
    narrow = [LinearConfig(kernel="narrow", tile_out=tile_out) for tile_out in TILE_OUT]
    extras = ((), ("bias", "residual"))
    few = [LinearConfig(kernel="split", tile_tokens=tile, tile_out=64, tile_k=64) for tile in (16, 32)]
    few += [LinearConfig(kernel="vector", tile_out=8, tile_k=64, num_warps=8, num_stages=1)]
    kinds = ((NARROW_BLOCKS, narrow), (LINEAR_BLOCKS, wide), ([(64, 64)], few))
    return [kind for blocks, configs in kinds for kind in product(blocks, extras, configs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=("conv", "linear", "search", "roles"))
    launches: list[tuple[str, str, Callable[[], float]]]
    kernel = parser.parse_args().kernel
    if kernel == "conv":
        launches = [
            (str(VARIANTS[i]), VARIANTS[i].dtype, partial(conv_error, VARIANTS[i], programs))
            for i, programs in CONV_VARIANTS.items()
        ]
    elif kernel == "search":
        launches = [(name, "float32", run) for name, run in search_selection.launches()]
    elif kernel == "roles":
        from tests.kernels.roles_control import roles_error

        launches = [("roles and nothing else", "float32", partial(roles_error, PROGRAMS))]
    else:
        launches = [
            (f"{block} {extras} {config.to_key()}", "float16", partial(linear_error, block, extras, config))
            for block, extras, config in linear_kinds()
        ]
    wrong = 0
    for name, dtype, run in launches:
        error = run()
        wrong += not error <= tolerance(getattr(torch, dtype), True)
        print(f"{error:.1e} {name}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
