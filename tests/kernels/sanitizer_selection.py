"""Small launches of the Hopper kernels for compute-sanitizer, which slows a kernel down a thousandfold.

    python -m tests.kernels.sanitizer_selection conv    # compiles
    compute-sanitizer --tool memcheck  python -m tests.kernels.sanitizer_selection conv
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitizer_selection linear

Programs run several tiles each on rings that wrap around, with and without an epilogue. Every result is compared with
float64; the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from tests.kernels.hopper_conv_variants import VARIANTS, Variant
from tests.support.operands import ConvCase, LinearCase, linear_operands
from tetris import reference
from tetris.kernels.configs import Conv2dProblem, LinearConfig
from tetris.tolerances import relative_error, tolerance

PROGRAMS = 3
"""Few, so that each of them walks several tiles."""
CONV_VARIANTS = (2, 8, 15, 35)
"""Of ``hopper_conv_variants``: tall tiles, pairs of rows with pooling, stride 2, permuted channels."""
LINEAR_BLOCKS = ((64, 64), (64, 16), (128, 32), (32, 32))


def conv_error(variant: Variant) -> float:
    """The relative error of one small launch."""
    from tetris.kernels.hopper.conv2d import block_sparse_conv2d, conv2d_schedule

    size = 4 * variant.stride[0] * 2
    case = ConvCase(
        128, 128, variant.block, variant.kernel_size, variant.stride, variant.padding, variant.dilation,
        variant.tile[0], size, size, 0.5, variant.activation, variant.extras,
    )  # fmt: skip
    operands = variant.operands(case, torch.device("cuda"))
    names = ("kernel_size", "stride", "padding", "dilation")
    problem = Conv2dProblem(
        case.batch, case.c_in, case.c_out, size, size, block=case.block, dtype=variant.dtype,
        n_blocks=len(operands["values"]), **{name: operands[name] for name in names},
    )  # fmt: skip
    schedule = conv2d_schedule(operands["indptr"], operands["indices"], problem, variant.config, PROGRAMS, "cuda")
    y = block_sparse_conv2d(
        **operands, allow_tf32=True, max_pool=variant.max_pool, config=variant.config, schedule=schedule
    )
    expected = reference.block_sparse_conv2d(**operands)
    return relative_error(y, torch.nn.functional.max_pool2d(expected, 2) if variant.max_pool else expected)


def linear_error(block: tuple[int, int], extras: tuple[str, ...]) -> float:
    """The relative error of one small launch."""
    from tetris.kernels.hopper.linear import block_sparse_linear
    from tetris.kernels.hopper.linear_schedule import make_linear_schedule

    case = LinearCase(512, 256, block, (300,), 0.5, "relu", extras)
    operands = linear_operands(case, torch.float16, torch.device("cuda"))
    config = LinearConfig(kernel="hopper", tile_tokens=256)
    schedule = make_linear_schedule(
        operands["indptr"], operands["indices"], block=block, tokens=300, tile_tokens=256, n_programs=PROGRAMS
    )
    y = block_sparse_linear(**operands, config=config, schedule=schedule)
    return relative_error(y, reference.block_sparse_linear(**operands))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=("conv", "linear"))
    launches: list[tuple[str, str, Callable[[], float]]]
    if parser.parse_args().kernel == "conv":
        variants = [VARIANTS[i] for i in CONV_VARIANTS]
        launches = [(str(variant), variant.dtype, partial(conv_error, variant)) for variant in variants]
    else:
        kinds = product(LINEAR_BLOCKS, ((), ("bias", "residual")))
        launches = [(f"{kind}", "float16", partial(linear_error, *kind)) for kind in kinds]
    wrong = 0
    for name, dtype, run in launches:
        error = run()
        wrong += not error <= tolerance(getattr(torch, dtype), True)
        print(f"{error:.1e} {name}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
