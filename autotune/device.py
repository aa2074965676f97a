"""What machine this is: the facts that defaults, tuned choices and bench rows are keyed by."""

from __future__ import annotations

import importlib.metadata
import platform
import re

import torch

from tetris.kernels.configs import DeviceInfo
from tetris.kernels.device import device_info as gpu_info

CPU = "cpu"


def package_version(name: str) -> str:
    """The installed version of a package, "none" where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_name(device: str | torch.device = CPU) -> str:
    """The full name: a GPU's ("NVIDIA H200"), or a processor's kind and threads ("cpu x86_64, 2 threads")."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def short_name(device: str | torch.device = CPU) -> str:
    """A name for folders: the GPU's last word that holds a digit, in lower case ("h200", "a100"), otherwise "cpu"."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    return short_gpu_name(torch.cuda.get_device_name(device))


def short_gpu_name(name: str) -> str:
    """The model within a GPU's full name: "NVIDIA A100-SXM4-80GB" -> "a100", "NVIDIA GeForce RTX 4090" -> "4090"."""
    words = re.findall(r"[A-Za-z]*\d+[A-Za-z]*", name)
    return (words[0] if words else re.sub(r"\W+", "-", name).strip("-")).lower()


def versions() -> str:
    """The versions that decide a time, as one text: ``torch 2.11.0, triton 3.6.0``."""
    parts = [f"torch {torch.__version__.split('+')[0]}", f"triton {package_version('triton')}"]
    if torch.cuda.is_available():
        parts.append(f"cudnn {torch.backends.cudnn.version()}")
    return ", ".join(parts)


def device_info(device: str | torch.device = "cuda") -> DeviceInfo:
    """The :class:`tetris.kernels.configs.DeviceInfo` of a GPU, which the analytic configurations ask for.

    A machine without a GPU answers with capability (0, 0) and one multiprocessor a thread.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return gpu_info(device)
    return DeviceInfo(device_name(device), (0, 0), torch.get_num_threads(), package_version("triton"))
