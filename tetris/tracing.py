"""Tracing: a user's model as a torch.fx graph with the shapes that its tensors have on example inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from tetris.block_sparse_layer import FusedLayer
from tetris.errors import TetrisError, UnsupportedError, describe

ExampleInputs = torch.Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) to call a model with: a tensor is one argument, a tuple or list several, a dict keywords."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if not isinstance(example_inputs, torch.Tensor):
        raise TetrisError(
            "example_inputs: wanted a tensor, a tuple of arguments or a dict of keywords; "
            f"got {describe(example_inputs)}"
        )
    return (example_inputs,), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def call_once(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run the model in evaluation mode without gradients."""
    args, kwargs = as_arguments(example_inputs)
    with evaluating(model), torch.no_grad():
        model(*args, **kwargs)


class _Tracer(fx.Tracer):
    """Stops at torch's modules, at parametrized ones and at Tetris' own layers."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return (
            isinstance(m, FusedLayer)
            or nn.utils.parametrize.is_parametrized(m)
            or super().is_leaf_module(m, qualified_name)
        )


class _Shapes(fx.Interpreter):
    """Runs a traced model and notes the shape of every tensor at its node, as ``node.meta["shape"]``."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def trace(model: nn.Module, example_inputs: ExampleInputs) -> fx.GraphModule:
    """``model`` as a GraphModule in evaluation mode with the shapes of ``example_inputs`` on every node.

    Raises:
        UnsupportedError: torch.fx cannot trace it (control flow that depends on data), with fx's reason.
        TetrisError: the model does not run on ``example_inputs``.
    """
    args, kwargs = as_arguments(example_inputs)
    name = type(model).__name__
    with evaluating(model):
        try:
            traced = fx.GraphModule(model, _Tracer().trace(model), name)
        except Exception as error:  # fx raises many kinds: TraceError, TypeError, AttributeError, RuntimeError ...
            raise UnsupportedError(
                f"trace: wanted a model that torch.fx can trace; {name} failed with {type(error).__name__}: {error}; "
                "move control flow that depends on tensor values out of forward"
            ) from error
        values = _placeholder_values(traced, args, kwargs)
        try:
            with torch.no_grad():
                _Shapes(traced).run(*values)
        except Exception as error:  # whatever the user's own operations raise
            given = ", ".join(describe(value) for value in [*args, *kwargs.values()]) or "nothing"
            raise TetrisError(
                f"example_inputs: wanted inputs that {name} runs on; got {given}: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            ) from error
    return traced


def _placeholder_values(traced: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments and keywords in the order of the placeholders, defaults where nothing is given."""
    placeholders = {str(n.target): n for n in traced.graph.nodes if n.op == "placeholder"}
    unknown = kwargs.keys() - placeholders.keys()
    if unknown and not any(name.startswith("**") for name in placeholders):
        raise TetrisError(
            f"example_inputs: wanted keywords of {', '.join(placeholders)}; got {', '.join(sorted(unknown))}"
        )
    values = list(args)
    for name, node in list(placeholders.items())[len(args) :]:
        if name not in kwargs and not node.args:
            break  # ``*args``, ``**kwargs``, or an argument that is missing, which running the model says
        values.append(kwargs.get(name, node.args[0] if node.args else None))
    return values
