"""Repeated calls on a GPU, eager and compiled, give bit for bit what launching everything anew gives."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tetris import ops, stem
from tetris.autotune.timer import graphed
from tetris.bench.eager_bench import CASES, EagerCase, kernel_of, layers
from tetris.kernels.recording import unrecorded
from tetris.layers import BlockSparseLinear
from tetris.registration import Operation, remembered
from tetris.reordering import reorder
from tetris.stem import StemConv2d

pytestmark = pytest.mark.gpu


def made(case: EagerCase) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(layer, input, a residual) of a case."""
    dense, layer, x = layers(case, "cuda", case.dtype)
    with torch.no_grad():
        residual = torch.randn_like(dense(x))
    return layer, x, residual


def slow(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Nothing repeated."""
    with unrecorded():
        return layer._forward(x, residual)  # type: ignore[operator]


OPERATIONS = (ops.CONV2D, ops.LINEAR, ops.PERMUTATION, stem.STEM)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that were run and not repeated, by name, in order; nothing is remembered of earlier calls."""
    ran: list[str] = []
    remembered.cache_clear()
    for operation in OPERATIONS:

        def run(operation: Operation = operation, run: Any = operation.run, **arguments: Any) -> torch.Tensor:
            ran.append(operation.name)
            return run(**arguments)

        monkeypatch.setattr(operation, "run", run)
    return ran


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_every_kernel_is_repeated_with_the_same_result(case: EagerCase) -> None:
    layer, x, residual = made(case)
    for given in (None,) if isinstance(layer, StemConv2d) else (None, residual):
        extra = () if given is None else (given,)
        layer(x, *extra)
        assert layer._calls.refused == "", f"{kernel_of(layer, x)}: {layer._calls.refused}"
        for _ in range(3):
            other = torch.randn_like(x)
            y = layer(other, *extra)
            expected = slow(layer, other, given)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert len(layer._calls) == (1 if isinstance(layer, StemConv2d) else 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_every_operation_is_repeated_with_the_same_result(case: EagerCase, anew: list[str]) -> None:
    layer, x, residual = made(case)
    for given in (None,) if isinstance(layer, StemConv2d) else (None, residual):
        for _ in range(2):
            layer._forward(x, given)  # type: ignore[operator]
        anew.clear()
        for _ in range(3):
            other = torch.randn_like(x)
            y, repeated = layer._forward(other, given), list(anew)  # type: ignore[operator]
            expected = slow(layer, other, given)
            assert torch.equal(y, expected) and y.stride() == expected.stride() and repeated == []


SPLIT = next(case for case in CASES if case.kernel == "split")
CONV = next(case for case in CASES if case.kernel == "hopper" and case.size)


@pytest.mark.parametrize("case", [SPLIT, CONV], ids=["linear", "convolution"])
@torch.no_grad()
def test_changed_weights_are_seen(case: EagerCase) -> None:
    layer, x, _ = made(case)
    before = layer(x)
    layer.values.mul_(2)
    assert torch.equal(layer(x), slow(layer, x)) and not torch.equal(layer(x), before)
    layer.bias = nn.Parameter(torch.ones_like(layer.bias), requires_grad=False)
    assert torch.equal(layer(x), slow(layer, x))
    layer.bias.data = torch.full_like(layer.bias, 2.0)
    assert torch.equal(layer(x), slow(layer, x))
    layer.activation = "none"
    assert torch.equal(layer(x), slow(layer, x)) and bool((layer(x) < 0).any())
    state = {
        name: torch.zeros_like(tensor) if name == "values" else tensor for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    assert torch.equal(layer(x), slow(layer, x)) and not torch.equal(layer(x), before)
    moved = copy.deepcopy(layer).cpu().cuda()
    assert torch.equal(moved(x), layer(x))


@torch.no_grad()
def test_other_inputs_are_recorded_apart() -> None:
    layer, x, _ = made(SPLIT)
    layer(x)
    wide = torch.randn(64, 2 * x.shape[1], device="cuda", dtype=x.dtype)
    flat = torch.randn(x.numel() + 1, device="cuda", dtype=x.dtype)
    inputs = [x[:7], x.view(4, 16, -1), wide[:, : x.shape[1]], flat[1:].view_as(x), x.t().contiguous().t()]
    for other in inputs:
        for _ in range(2):
            assert torch.equal(layer(other), slow(layer, other))
    shared = torch.randn(128, 4096, device="cuda", dtype=x.dtype)
    y = layer(shared[:64], shared[64:])  # input and residual in one piece of memory
    assert torch.equal(y, slow(layer, shared[:64], shared[64:]))


def test_gradients_and_compilers_go_through_the_operation() -> None:
    layer, x, _ = made(SPLIT)
    layer(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.abs().sum() > 0)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x), expected)
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x), expected)
        traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        assert any("block_sparse_linear" in str(node.target) for node in traced.graph.nodes)


COMPILED = [next(case for case in CASES if case.kernel == kernel) for kernel in ("hopper", "stem", "split", "vector")]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("case", [*COMPILED, CASES[-1]], ids=lambda case: case.name)
@torch.no_grad()
def test_compiled_layers_repeat_their_launches(case: EagerCase, mode: str, anew: list[str]) -> None:
    layer, x, _ = made(case)
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, mode=mode)
    for index in range(5):
        other = torch.randn_like(x)
        y = compiled(other).clone()
        assert torch.equal(y, slow(layer, other))
        if index == 2 and mode == "default":
            anew.clear()
    assert mode != "default" or anew == []


@torch.no_grad()
def test_compiled_layers_run_the_kernel_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = made(CONV)
    layer(x)
    layer.use_config(layer.launch(x).config)
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        layer(x)  # recorded in another mode, which half precision does not know
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x), slow(layer, x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.launch(x).config == layer.config != ""


@torch.no_grad()
def test_compiled_layers_see_changed_weights(anew: list[str]) -> None:
    layer, x, _ = made(SPLIT)
    before = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for _ in range(3):
        assert torch.equal(compiled(x), before)
    layer.values.mul_(2)
    assert torch.equal(compiled(x), slow(layer, x)) and not torch.equal(compiled(x), before)
    layer.load_state_dict({name: 3 * t if name == "bias" else t for name, t in layer.state_dict().items()})
    layer.bias.data = torch.full_like(layer.bias, 2.0)
    layer(x)  # makes launches again
    for _ in range(3):
        assert torch.equal(compiled(x), slow(layer, x))
    layer.cpu().cuda()
    layer(x)
    for _ in range(3):
        assert torch.equal(compiled(x), slow(layer, x))


@torch.no_grad()
def test_the_convolution_before_a_pooling_of_torch_is_repeated(anew: list[str]) -> None:
    layer, x, _ = made(next(case for case in CASES if case.kernel == "portable" and case.size))
    layer.max_pool = True
    for _ in range(4):
        anew.clear()
        y = layer(x)
    assert layer._calls.refused.startswith("it runs aten.max_pool2d") and anew == []
    assert torch.equal(y, slow(layer, x)) and y.shape[-1] == x.shape[-1] // 2


@torch.inference_mode()
def test_inference_mode_repeats_too(anew: list[str]) -> None:
    layer, x, _ = made(CONV)
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for _ in range(3):
        y = compiled(x)
    anew.clear()
    assert torch.equal(compiled(x), y) and torch.equal(y, layer(x)) and anew == []


@torch.no_grad()
def test_exported_programs_repeat_their_launches(anew: list[str], tmp_path: Path) -> None:
    layer, x, _ = made(CONV)
    expected = layer(x)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    for _ in range(3):
        y = program(x)
    anew.clear()
    assert torch.equal(program(x), y) and torch.equal(y, expected) and anew == []


@torch.no_grad()
def test_streams_run_repeated_operations_side_by_side(anew: list[str]) -> None:
    layer, x, _ = made(CONV)
    xs = [torch.randn_like(x) for _ in range(4)]
    twins = [copy.deepcopy(layer) for _ in xs]  # one layer must not run twice at the same time
    expected = [slow(twin, other) for twin, other in zip(twins, xs)]
    got: list[torch.Tensor] = []
    torch.cuda.synchronize()
    for _ in range(3):
        got = []
        for twin, other in zip(twins, xs):
            with torch.cuda.stream(torch.cuda.Stream()):
                got.append(twin._forward(other, None))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected)) and anew[8:] == []


@pytest.mark.parametrize("tokens", [1, 8, 64])
@torch.no_grad()
def test_quantised_weights_are_repeated(tokens: int) -> None:
    dense = nn.Linear(1024, 512).cuda().half()
    reordering = reorder(dense.weight, block=64, sparsity=0.5, method="sort")
    layer = BlockSparseLinear.from_dense(dense, reordering, weight_dtype="int8")
    for _ in range(3):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
        assert torch.equal(layer(x), slow(layer, x))
    assert len(layer._calls) == 1 and layer._calls.refused == ""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_a_layer_runs_on_its_own_gpu() -> None:
    layer, x, _ = made(CONV)
    expected = slow(layer, x)
    layer, x = layer.to("cuda:1"), x.to("cuda:1")
    for _ in range(3):
        assert torch.equal(layer(x), expected.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and len(layer._calls) == 1


@torch.no_grad()
def test_graphs_replay_repeated_calls() -> None:
    layer, x, _ = made(CONV)
    outputs: list[torch.Tensor] = []
    replay = graphed(lambda: outputs.append(layer(x)))
    x.copy_(torch.randn_like(x))
    replay()
    assert torch.equal(outputs[-1], layer(x)) and len(layer._calls) == 1


@torch.no_grad()
def test_threads_and_streams_share_a_layer() -> None:
    layer, x, _ = made(CONV)
    xs = [torch.randn_like(x) for _ in range(4)]
    expected, got = [slow(layer, other) for other in xs], [None] * 4

    def work(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(20):
                got[index] = layer(xs[index])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
