"""Compile a dense network in a process of its own, so that the bench finds it in the compiler's cache.

``python -m tetris.bench.compile_dense NETWORK BATCH DEVICE DTYPE MODE`` is such a process. torch.compile takes a minute
for a large network; the processes run side by side, and beside those that compile Tetris' kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tetris.autotune.whole_network import dense_baseline
from tetris.bench.networks import NETWORKS

COMPILE_THREADS = "4"
"""Processes that one torch.compile starts; its default, one a processor, is too many for several at once."""


def start(network: str, batch: int, device: str, dtype: torch.dtype, mode: str) -> subprocess.Popen[str]:
    """Start such a process and return at once."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    arguments = [network, str(batch), device, str(dtype).removeprefix("torch."), mode]
    return subprocess.Popen(
        [sys.executable, "-m", "tetris.bench.compile_dense", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a process; "" or the end of what it complained about. After ``seconds`` it is ended."""
    try:
        _, complaints = process.communicate(timeout=max(seconds, 0.01))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"torch.compile of a dense network: ended after {seconds:.0f} s"
    return complaints[-300:] if process.returncode else ""


@torch.no_grad()
def main(network: str, batch: str, device: str, dtype: str, mode: str) -> None:
    """Compile for one batch and run once; the weights do not matter."""
    case, kind = NETWORKS[network], getattr(torch, dtype)
    with torch.device(device):
        model = case.make().eval().to(kind)
    x = case.inputs(int(batch), device, kind)
    torch.compile(dense_baseline(model, x[:1]), mode=mode, dynamic=False)(x)


if __name__ == "__main__":
    main(*sys.argv[1:])
