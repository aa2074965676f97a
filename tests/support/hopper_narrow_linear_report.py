"""Child process of the narrow-block linear layer's ahead-of-time tests: compiles it for sm_90, prints JSON facts.

python -m tests.support.hopper_narrow_linear_report
"""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import torch

from tests.support.compiler import compiling
from tests.support.operands import LinearCase, linear_operands
from tetris.kernels.configs import LinearConfig
from tetris.kernels.hopper.narrow_linear import block_sparse_linear
from tetris.kernels.hopper.narrow_linear_schedule import TILE_OUT, make_narrow_schedule

FUSED = {"extras": ("bias", "residual"), "activation": "gelu"}
CASES = {
    "32x32": (LinearCase(512, 512, (32, 32), (1000,), extras=()), torch.float16),
    "32x32 fused": (LinearCase(512, 512, (32, 32), (1000,), **FUSED), torch.float16),
    "32x64 fused": (LinearCase(512, 512, (32, 64), (1000,), **FUSED), torch.bfloat16),
    "64x16 fused": (LinearCase(512, 512, (64, 16), (1000,), **FUSED), torch.bfloat16),
    "128x16": (LinearCase(512, 512, (128, 16), (1000,), activation="relu6"), torch.float16),
    "128x32 fused": (LinearCase(512, 512, (128, 32), (1000,), **FUSED), torch.float16),
}


def main() -> None:
    """Compile every case and print its facts."""
    facts = {}
    for (name, (case, dtype)), tile_out in product(CASES.items(), TILE_OUT):
        operands = linear_operands(case, dtype, torch.device("cpu"))
        schedule = make_narrow_schedule(
            operands["indptr"],
            operands["indices"],
            block=case.block,
            tokens=case.tokens[0],
            n_programs=132,
            tile_out=tile_out,
        )
        with compiling(90) as results:
            config = LinearConfig(kernel="narrow", tile_out=tile_out)
            block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
        facts[f"{name} {tile_out}"] = dataclasses.asdict(results[0])
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
