"""Child process of the ahead-of-time tests: compiles the kernels with their default configs, prints JSON facts.

python -m tests.support.compile_report 90
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
import triton

from tests.support.compiler import Compiled, compiling
from tests.support.operands import (
    ConvCase,
    LinearCase,
    conv2d_operands,
    conv2d_problem,
    linear_operands,
    linear_problem,
)
from tetris.kernels.configs import DeviceInfo, default_conv2d_config, default_linear_config
from tetris.kernels.conv2d import block_sparse_conv2d
from tetris.kernels.linear import block_sparse_linear
from tetris.kernels.linear_paths import (
    choose_linear_config,
    linear_launcher,
    linear_schedule,
    refuses_weights,
    split_config,
)
from tetris.kernels.permute import permute_channels

EVERYTHING = ("bias", "residual", "input", "output")
LARGE = {"c_out": 512, "c_in": 512, "height": 28, "width": 28, "batch": 16}

CONVS = {
    "float16 64x64": (ConvCase(block=(64, 64), **LARGE), "float16"),
    "bfloat16 64x32 fused": (
        ConvCase(block=(64, 32), activation="gelu", extras=("bias", "residual"), **LARGE),
        "bfloat16",
    ),
    "float16 64x16 permuted": (ConvCase(block=(64, 16), extras=EVERYTHING, **LARGE), "float16"),
    "float16 128x64": (ConvCase(block=(128, 64), **LARGE), "float16"),
    "float16 32x32": (ConvCase(block=(32, 32), **LARGE), "float16"),
    "float16 strided": (ConvCase(block=(64, 64), stride=(2, 2), **LARGE), "float16"),
    "float16 25x10": (ConvCase(c_out=50, c_in=20, block=(25, 10), kernel_size=(5, 5), batch=64), "float16"),
    "tf32 64x64": (ConvCase(block=(64, 64), **LARGE), "float32"),
    "float32 64x64": (ConvCase(block=(64, 64), **LARGE), "float32"),
}
LINEARS = {
    "float16 64x64": (LinearCase(1024, 1024, (64, 64), (4096,)), "float16"),
    "float16 128x32": (LinearCase(1024, 1024, (128, 32), (4096,)), "float16"),
    "float16 one token": (LinearCase(1024, 1024, (64, 64), (1,)), "float16"),
    "bfloat16 64x64 permuted": (LinearCase(1024, 1024, (64, 64), (512,), extras=EVERYTHING), "bfloat16"),
}
SPLITS = {
    "float16 64x64, 128 tokens": (LinearCase(1024, 4096, (64, 64), (128,), extras=()), "float16"),
    "float16 64x64, 20 tokens": (LinearCase(1024, 4096, (64, 64), (20,)), "float16"),
    "bfloat16 128x64 fused": (
        LinearCase(1024, 4096, (128, 64), (64,), extras=("bias", "residual", "output"), activation="gelu"),
        "bfloat16",
    ),
}
QUANTIZED = {
    f"{weights} {tokens} tokens": LinearCase(1024, 1024, (64, 64), (tokens,), weight_dtype=weights)
    for weights in ("int8", "float8_e4m3fn")
    for tokens in (1, 16, 128, 4096)
}


def device_of(arch: int | str) -> DeviceInfo:
    """The device that a target stands for."""
    if isinstance(arch, str):
        return DeviceInfo(arch, (0, 0), 304, triton.__version__, backend="hip")
    return DeviceInfo(f"sm_{arch}", (arch // 10, arch % 10), 132, triton.__version__)


def compile_all(arch: int | str) -> dict[str, list[Compiled]]:
    """The facts about every kernel that each case launches."""
    device, cpu = device_of(arch), torch.device("cpu")
    report: dict[str, list[Compiled]] = {}
    for name, (case, dtype) in CONVS.items():
        operands = conv2d_operands(case, getattr(torch, dtype), cpu)
        with compiling(arch) as results:
            config = default_conv2d_config(conv2d_problem(case, operands), device)
            block_sparse_conv2d(**operands, allow_tf32="tf32" in name, config=config)
        report[f"conv2d {name}"] = results
    for name, (case, dtype) in LINEARS.items():
        operands = linear_operands(case, getattr(torch, dtype), cpu)
        with compiling(arch) as results:
            config = default_linear_config(linear_problem(case, operands), device)
            block_sparse_linear(**operands, config=config)
        report[f"linear {name}"] = results
    for name, (case, dtype) in SPLITS.items() if device.capability == (9, 0) else ():
        operands = linear_operands(case, getattr(torch, dtype), cpu)
        problem = linear_problem(case, operands)
        config = split_config(problem, device)
        schedule = linear_schedule(problem, config, operands["indptr"], operands["indices"], device.sm_count)
        with compiling(arch) as results:
            linear_launcher("split")(**operands, config=config, schedule=schedule.tensors)
        report[f"linear split {name}"] = results
    for name, case in QUANTIZED.items():
        if refuses_weights(case.weight_dtype, device):
            continue
        operands = linear_operands(case, torch.float16, cpu)
        problem = linear_problem(case, operands)
        config = choose_linear_config(problem, device)
        schedule = linear_schedule(problem, config, operands["indptr"], operands["indices"], device.sm_count)
        extra = {} if schedule is None else {"schedule": schedule.tensors}
        with compiling(arch) as results:
            linear_launcher(config.kernel)(**operands, config=config, **extra)
        report[f"linear {name}"] = results
    with compiling(arch) as results:
        for channels in (100, 20000):
            permute_channels(torch.empty(4, channels), torch.arange(channels), dim=1)
    report["permute"] = results
    return report


if __name__ == "__main__":
    target = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
    compiled = compile_all(target)
    print(json.dumps({name: [dataclasses.asdict(k) for k in kernels] for name, kernels in compiled.items()}))
