"""Keys in the compiler's cache do not depend on which kernel a process runs first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

REPORT = """
import importlib, json, os
from tetris.kernels.cache_keys import settle

FILES = ("conv2d linear linear_decode linear_split linear_vector permute stem_conv2d "
         "hopper.conv2d_device hopper.linear_device hopper.narrow_linear_device").split()
modules = [importlib.import_module(f"tetris.kernels.{name}") for name in FILES]
kernels = [value for module in modules for name, value in sorted(vars(module).items())
           if name.endswith("kernel") and hasattr(type(value), "cache_key")]
for first in kernels:
    reading, writing = os.pipe()
    if os.fork() == 0:
        for kernel in [first, *reversed(kernels)]:
            settle(kernel)
        os.write(writing, json.dumps([kernel.cache_key for kernel in kernels]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        print(pipe.read())
    os.wait()
"""


def test_keys_are_the_same_whatever_runs_first() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", REPORT]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) >= 10 and len(found) == len(found[0]) == len(set(found[0]))
    assert all(other == found[0] for other in found)
