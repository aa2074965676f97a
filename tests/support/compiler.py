"""Compile Triton kernels for GPUs that are not here, through their launchers.

Under :func:`compiling`, ``kernel[grid](...)`` compiles for the target and records the result instead of launching, so
that a launcher called on CPU tensors shows exactly what it would run. No driver is needed; the assembler comes with
Triton. Neither the interpreter nor a GPU may be active in the process: run it in a child.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, "gfx942": 65536}
"""Bytes of shared memory that one program may use."""


@dataclass(frozen=True)
class Compiled:
    """What the assembler said of one kernel.

    Attributes:
        name: the kernel's.
        shared_bytes: shared memory of a program.
        registers: per thread; 0 where unknown (AMD).
        spill_bytes: registers that went to local memory, stores and loads.
        serialized: whether wgmma instructions are serialised (ptxas warning C7515).
        wgmma: asynchronous warpgroup matrix instructions in the PTX.
        mma: all matrix instructions.
        async_copies: cp.async and bulk (TMA) copies from global to shared memory.
    """

    name: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    serialized: bool
    wgmma: int
    mma: int
    async_copies: int


class StubDriver:
    """Just enough of a driver for ``JITFunction.warmup``: a target, a device index and a stream."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _target(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def _assemble(ptx: str, arch: int) -> str:
    """What ptxas prints for the PTX: resources and warnings."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [ptxas, "-v", f"--gpu-name={name}", source.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ptxas failed: {result.stderr}")
    return result.stderr


def inspect(kernel: Any, name: str, arch: int | str) -> Compiled:
    """The facts about a compiled kernel."""
    if isinstance(arch, str):
        assembly = kernel.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", assembly))
        mma = len(re.findall(r"v_mfma", assembly))
        return Compiled(name, kernel.metadata.shared, 0, spills, False, 0, mma, 0)
    ptx = kernel.asm["ptx"]
    log = _assemble(ptx, arch)
    wgmma = ptx.count("wgmma.mma_async")
    return Compiled(
        name=name,
        shared_bytes=kernel.metadata.shared,
        registers=max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        serialized="C7515" in log or "serializ" in log,
        wgmma=wgmma,
        mma=wgmma + len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),
        async_copies=len(re.findall(r"cp\.async\.(?:ca|cg|bulk\.tensor\.\dd\.shared)", ptx)),
    )


@contextmanager
def compiling(arch: int | str) -> Iterator[list[Compiled]]:
    """Within it, launches compile for ``arch`` (90 = sm_90, "gfx942" = AMD) and their facts collect in the list."""
    results: list[Compiled] = []

    def compile_instead(kernel: JITFunction, grid: object) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            kernel.device_caches.clear()
            results.append(inspect(kernel.warmup(*args, grid=(1,), **kwargs), kernel.fn.__name__, arch))

        return run

    previous, launch, assemble = driver._active, JITFunction.__getitem__, CUDABackend.make_cubin
    driver.set_active(StubDriver(_target(arch)))
    JITFunction.__getitem__ = compile_instead
    CUDABackend.make_cubin = lambda *_: b""  # assembled by ``inspect``, which keeps what ptxas says
    try:
        with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
            knobs.cache.dir = cache  # nothing unassembled may stay in the user's cache
            yield results
    finally:
        driver._active = previous
        JITFunction.__getitem__ = launch
        CUDABackend.make_cubin = assemble
