"""A first compilation, of the smallest kernel: it takes from later ones what a process pays for once."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _copy_one(source, target):
    tl.store(target, tl.load(source))


def start_compiler() -> None:
    """Compile for a GPU that need not be there: Triton hashes itself, asks the assembler's version and starts LLVM.

    Cost: half a second, of which a kernel in the cache saves little; neither a driver nor a GPU is touched.
    """
    signature = {"source": "*fp32", "target": "*fp32"}
    triton.compile(ASTSource(_copy_one, signature, {}), target=GPUTarget("cuda", 90, 32))
