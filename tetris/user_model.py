"""The command line's door to a user's own model: ``FILE.py:factory``, a weights file, example inputs.

Whatever is wrong with them ends in one TetrisError that names the file and what to do; the user's own exceptions are
quoted, with the line they came from, and chained.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tetris.errors import FileFormatError, TetrisError, describe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXAMPLE_FUNCTION = "example_inputs"


@dataclass(frozen=True)
class UserModel:
    """A model in evaluation mode and the inputs to trace and time it with, both on the wanted device and dtype."""

    model: nn.Module
    inputs: Any


def load_user_model(
    target: str,
    weights: Path | None = None,
    input_shape: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    seed: int = 0,
) -> UserModel:
    """Make the model that ``target`` names and its example inputs.

    Args:
        target: ``path/to/file.py:function``; the function takes no arguments and returns an ``nn.Module``.
        weights: a state dict (.safetensors, or a file of ``torch.save``) to load into it.
        input_shape: such as ``1,3,224,224``: one normally distributed input of that shape. Without it the file has to
            define ``example_inputs()``, which returns a tensor, or a tuple or dict of them.
        dtype: "fp32", "fp16" or "bf16": the model's and its floating-point inputs'.
    """
    if dtype not in DTYPES:
        raise TetrisError(f"dtype: wanted one of {', '.join(DTYPES)}; got {dtype!r}")
    path, factory = split_target(target)
    module = _import_file(path)
    model = _call(module, factory, path)
    if not isinstance(model, nn.Module):
        raise TetrisError(f"{path}: {factory}() should return an nn.Module; got {describe(model)}")
    if weights is not None:
        load_weights(model, weights)
    if input_shape is not None:
        inputs: Any = torch.randn(parse_shape(input_shape), generator=torch.Generator().manual_seed(seed))
    elif hasattr(module, EXAMPLE_FUNCTION):
        inputs = _call(module, EXAMPLE_FUNCTION, path)
    else:
        raise TetrisError(
            f"{path}: no example input; pass --input 1,3,224,224 or define {EXAMPLE_FUNCTION}() in the file"
        )
    model = model.to(device=device, dtype=DTYPES[dtype]).eval()
    return UserModel(model, _moved(inputs, torch.device(device), DTYPES[dtype]))


def split_target(target: str) -> tuple[Path, str]:
    """``file.py:function`` -> (path, function name); the colon counts from the right."""
    path, colon, factory = target.rpartition(":")
    if not colon or not path or not factory.isidentifier():
        raise TetrisError(f"model: wanted FILE.py:function, such as my_model.py:make_model; got {target!r}")
    if not Path(path).is_file():
        raise FileFormatError(f"model: there is no file {path}; wanted FILE.py:function")
    return Path(path), factory


def parse_shape(text: str) -> tuple[int, ...]:
    """``1,3,224,224`` -> (1, 3, 224, 224)."""
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise TetrisError(f"input: wanted positive sizes with commas, such as 1,3,224,224; got {text!r}")
    return tuple(int(part) for part in parts)


def parse_block(text: str) -> str | int | tuple[int, int]:
    """``auto``, ``32``, ``64x32`` or ``64,32`` (outputs, inputs)."""
    if text == "auto":
        return text
    parts = text.replace("x", ",").split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise TetrisError(f"block: wanted auto, a size such as 32 or a pair OUTxIN such as 64x32; got {text!r}")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def parse_sparsity(text: str) -> float | dict[str, float]:
    """``0.73``, or ``conv*=0.5,fc1=0.9``: a rate for every layer whose name matches the pattern."""
    try:
        if "=" not in text:
            return float(text)
        pairs = (part.rpartition("=") for part in text.split(","))
        return {pattern.strip(): float(rate) for pattern, _, rate in pairs}
    except ValueError:
        raise TetrisError(
            f"sparsity: wanted a number such as 0.73 or patterns such as 'conv*=0.5,fc1=0.9'; got {text!r}"
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``; every name and shape must match."""
    state = read_state_dict(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise FileFormatError(
            f"weights: {path} does not fit the model: missing {_some(missing)}; unexpected {_some(extra)}"
        )
    wrong = [f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if wrong:
        raise FileFormatError(f"weights: {path} holds other shapes than the model's: {_some(wrong)}")
    model.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a .safetensors file or of a ``torch.save`` file; pickled code is never run."""
    if not path.is_file():
        raise FileFormatError(f"weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"weights: {path} is corrupt or holds more than tensors; save it with torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # the readers' own error types differ by version; every one of them means a bad file
        raise FileFormatError(f"weights: {path} cannot be read ({_first_line(error)})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FileFormatError(
            f"weights: {path} should hold a state dict (names and tensors); got {type(state).__name__}"
        )
    return state


def _import_file(path: Path) -> ModuleType:
    """The module of a file; its folder can be imported from, as for a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileFormatError(f"model: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise TetrisError(f"model: {path} does not import: {_where(error, path)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _call(module: ModuleType, name: str, path: Path) -> Any:
    """The result of a function of the user's file."""
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise TetrisError(f"model: {path} has no function {name}; it defines {_some(known)}")
    try:
        return function()
    except Exception as error:  # a user's function may raise anything
        raise TetrisError(f"model: {name}() of {path} failed: {_where(error, path)}") from error


def _moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors within tuples, lists and dicts on the device; floating-point ones in the dtype."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    if isinstance(inputs, (tuple, list)):
        return tuple(_moved(item, device, dtype) for item in inputs)
    if isinstance(inputs, dict):
        return {name: _moved(item, device, dtype) for name, item in inputs.items()}
    raise TetrisError(f"{EXAMPLE_FUNCTION}: wanted a tensor or a tuple or dict of them; got {describe(inputs)}")


def _where(error: Exception, path: Path) -> str:
    """Type, text and the last line of the user's file that took part."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _some(names: list[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
