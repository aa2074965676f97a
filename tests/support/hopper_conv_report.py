"""Child process of the ahead-of-time tests: compiles variants of the Hopper convolution for sm_90, prints JSON facts.

python -m tests.support.hopper_conv_report 0 3 9            (of the sweep's variants)
python -m tests.support.hopper_conv_report defaults         (the configs that layers get where nothing is tuned)
python -m tests.support.hopper_conv_report pooled-defaults  (of them a dozen that pool)
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys

import torch
import triton

from tests.kernels.hopper_conv_variants import VARIANTS, Variant
from tests.support.compiler import Compiled, compiling
from tests.support.hopper_conv_defaults import default_variants
from tetris.kernels.configs import DeviceInfo
from tetris.kernels.hopper import conv2d as launcher


def compile_variant(variant: Variant) -> Compiled:
    """Launch the variant on CPU tensors under the compiling driver."""
    case = variant.problem(random.Random(0))
    operands = variant.operands(case, torch.device("cpu"))
    schedule = variant.schedule(case, operands, 132)
    with compiling(90) as results:
        launcher.block_sparse_conv2d(
            **operands, allow_tf32=True, max_pool=variant.max_pool, config=variant.config, schedule=schedule
        )
    return results[0]


if __name__ == "__main__":
    launcher.device_info = lambda device: DeviceInfo("sm_90", (9, 0), 132, triton.__version__)
    if sys.argv[1] == "defaults":
        chosen = default_variants()
    elif sys.argv[1] == "pooled-defaults":
        chosen = [v for v in default_variants() if v.max_pool and v.block == (64, 32)]
    else:
        chosen = [VARIANTS[int(index)] for index in sys.argv[1:]]
    print(json.dumps({str(variant): dataclasses.asdict(compile_variant(variant)) for variant in chosen}))
