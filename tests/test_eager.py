"""When a layer's call is repeated from a recording, and when it is not; without a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.test_recording import Kernel
from tetris import eager
from tetris.eager import MOST_KINDS, Call, EagerCalls, is_plain
from tetris.kernels.recording import launch
from tetris.layers import BlockSparseLinear
from tetris.stem import StemConv2d


class Affine(nn.Module):
    """2 x + shift (+ residual) on eight numbers, through stand-ins for kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8), requires_grad=False)
        self.calls, self.kernel, self.scale, self.ran = EagerCalls(), Kernel(), 2.0, 0
        self.schedule: list[Tensor] = []

    def eager_key(self) -> tuple:
        return (self.scale,)

    def eager_constants(self) -> list[Tensor]:
        return self.schedule

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.calls(self, self._forward, x, residual)

    def _forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        self.ran += 1
        if not self.schedule:
            self.schedule.append(torch.zeros(8))
        y = torch.empty_like(x)
        launch(self.kernel, (1,), x, y, self.shift, 8, SCALE=self.scale)
        launch(self.kernel, (1,), y, y, self.schedule[0], 8)
        if residual is None:
            return y
        total = torch.empty_like(x)
        launch(self.kernel, (1,), y, total, residual, 8)
        return total


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Affine:
    """Every call counts as plain, as one on a GPU."""
    monkeypatch.setattr(eager, "is_plain", lambda *call: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Affine()


def check(layer: Affine, ran: int, x: Tensor | None = None, residual: Tensor | None = None) -> None:
    """The result is right, and ``run`` was called that often for it."""
    x, before = torch.randn(8) if x is None else x, layer.ran
    expected = layer.scale * x + layer.shift + (0 if residual is None else residual)
    torch.testing.assert_close(layer(x, residual), expected)
    assert layer.ran - before == ran


def test_the_first_call_of_a_kind_is_recorded(layer: Affine) -> None:
    check(layer, 2)  # the first run makes the schedule
    check(layer, 0)
    check(layer, 1, residual=torch.randn(8))
    check(layer, 0, residual=torch.randn(8))
    unaligned = torch.randn(9)[1:]  # kernels are compiled apart for these
    check(layer, 1, unaligned)
    check(layer, 0, unaligned)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.shift.mul_(2),
        lambda layer: setattr(layer, "shift", nn.Parameter(torch.randn(8), requires_grad=False)),
        lambda layer: setattr(layer.shift, "data", torch.randn(8)),
        lambda layer: setattr(layer, "scale", 3.0),
        lambda layer: layer.load_state_dict({"shift": torch.ones(8)}),
    ],
)
def test_a_changed_layer_is_recorded_anew(layer: Affine, change: Callable[[Affine], object]) -> None:
    check(layer, 2)
    change(layer)
    check(layer, 1)
    check(layer, 0)


def test_what_cannot_be_repeated_runs_every_time(layer: Affine) -> None:
    layer.kernel = Kernel(scratch=1)
    check(layer, 2)
    check(layer, 1)
    assert layer.calls.refused == "its kernel asks for scratch memory"


def test_a_capture_is_not_recorded(layer: Affine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(layer, 1)
    assert len(layer.calls) == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check(layer, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(layer, 0)


def test_a_layer_does_not_remember_without_end(layer: Affine) -> None:
    for stride in range(1, MOST_KINDS + 3):
        layer(torch.randn(8 * stride)[::stride])
    assert 0 < len(layer.calls) <= MOST_KINDS


def test_a_layer_that_moves_lets_go_of_what_it_leaves_behind() -> None:
    layer = nn.Sequential(BlockSparseLinear(32, 32, (16, 16), 4), StemConv2d(3, 8, (3, 3)))
    for part in layer:
        part._calls._found[("key",)] = Call(None, ())
    layer.half()
    assert all(part._calls._found == {} for part in layer)
    layer[0]._calls._found[("key",)] = Call(None, ())
    layer.load_state_dict(layer.state_dict())
    assert layer[0]._calls._found == {} and layer[0].eager_key() == ("none", False, "")


def test_copies_start_anew(layer: Affine) -> None:
    check(layer, 2)
    for other in (copy.deepcopy(layer.calls), pickle.loads(pickle.dumps(layer.calls))):
        assert len(other) == 0 and len(layer.calls) == 1
    twin = copy.deepcopy(layer)
    assert twin.calls is not layer.calls
    check(twin, 1)


def test_plain_calls_are_those_that_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Affine(), torch.randn(8)
    assert not is_plain(layer, x, None)  # on the CPU
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert is_plain(layer, x, None) and is_plain(layer, x, x + 1)
    assert not is_plain(layer, x.as_subclass(nn.Parameter), None)
    assert not is_plain(layer, x, torch.empty(8, device="meta"))
    leaf = torch.randn(8, requires_grad=True)
    with torch.no_grad():
        assert is_plain(layer, leaf, leaf)
    assert not is_plain(layer, leaf, None) and not is_plain(layer, x, leaf)
    layer.shift.requires_grad_()
    assert not is_plain(layer, x, None)
    layer.shift.requires_grad_(False)
    with torch._subclasses.FakeTensorMode():
        assert not is_plain(layer, x, None)
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(is_plain(layer, row, None)), row)[1])(torch.randn(2, 8))
    torch.jit.trace(lambda row: (seen.append(is_plain(layer, row, None)), row + 1)[1], x, check_trace=False)
    assert seen and not any(seen)
    assert not is_plain(layer._replicate_for_data_parallel(), x, None)


def test_a_call_happens_on_the_gpu_of_its_input(layer: Affine, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: wanted.index)
        yield

    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    check(layer, 2)
    assert entered == [torch.device("cpu")]
    check(layer, 0)
    assert len(entered) == 1


def test_compilers_see_the_layer_itself() -> None:
    layer = Affine()
    layer.calls = EagerCalls()
    layer._forward = lambda x, residual: x + layer.shift  # type: ignore[method-assign]
    x = torch.randn(8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), x + layer.shift)
