"""Child process of the Hopper linear layer's ahead-of-time tests: compiles it for sm_90, prints JSON facts.

python -m tests.support.hopper_linear_report
"""

from __future__ import annotations

import dataclasses
import json

import torch

from tests.support.compiler import compiling
from tests.support.operands import LinearCase, linear_operands
from tetris.kernels.configs import LinearConfig
from tetris.kernels.hopper.linear import block_sparse_linear
from tetris.kernels.hopper.linear_schedule import make_linear_schedule

CASES = {
    "64x64": (LinearCase(512, 512, (64, 64), (1000,), extras=()), 256, torch.float16),
    "64x64, 128 tokens": (LinearCase(512, 512, (64, 64), (1000,), extras=()), 128, torch.float16),
    "64x64 fused": (
        LinearCase(512, 512, (64, 64), (1000,), extras=("bias", "residual"), activation="gelu"),
        256,
        torch.bfloat16,
    ),
    "32x32 fused": (
        LinearCase(512, 512, (32, 32), (1000,), extras=("bias", "residual"), activation="silu"),
        256,
        torch.float16,
    ),
    "64x32": (LinearCase(512, 512, (64, 32), (1000,), activation="relu"), 256, torch.float16),
    "128x32 gathered": (LinearCase(512, 4096, (128, 32), (1000,), kept=0.2), 256, torch.float16),
    "128x16": (LinearCase(512, 512, (128, 16), (1000,), activation="relu6"), 256, torch.bfloat16),
    "128x128": (LinearCase(512, 512, (128, 128), (1000,)), 256, torch.float16),
    "64x64 fused, 128 tokens": (
        LinearCase(512, 8192, (64, 64), (300,), extras=("bias", "residual"), activation="gelu"),
        128,
        torch.float16,
    ),
}


def main() -> None:
    """Compile every case and print its facts."""
    facts = {}
    for name, (case, tile_tokens, dtype) in CASES.items():
        operands = linear_operands(case, dtype, torch.device("cpu"))
        schedule = make_linear_schedule(
            operands["indptr"],
            operands["indices"],
            block=case.block,
            tokens=case.tokens[0],
            tile_tokens=tile_tokens,
            n_programs=132,
        )
        with compiling(90) as results:
            config = LinearConfig(kernel="hopper", tile_tokens=tile_tokens)
            block_sparse_linear(**operands, config=config, schedule=schedule.tensors)
        facts[name] = dataclasses.asdict(results[0])
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
