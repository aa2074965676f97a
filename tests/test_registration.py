"""Operations under two names: what calls are packed into, when their launches are repeated, what compilers see."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.test_recording import Kernel
from tetris import ops, stem
from tetris.errors import ShapeError
from tetris.kernels.recording import launch, layout_of
from tetris.registration import MOST_KINDS, Operation, packed, remembered, unpacked

KERNEL = Kernel()


def run_affine(
    x: Tensor, shift: Tensor, residual: Tensor | None, tables: Sequence[Tensor], scale: float, kind: str
) -> Tensor:
    """scale x + shift (+ residual) on eight numbers, through stand-ins for kernels; "refused" copies x first."""
    y = torch.empty_like(x)
    launch(KERNEL, (1,), x.clone() if kind == "refused" else x, y, shift, 8, SCALE=scale)
    for added in (*tables, *([] if residual is None else [residual])):
        launch(KERNEL, (1,), y, y, added, 8)
    return y


def affine_in_torch(x, shift, residual, tables, scale, kind):
    return scale * x + shift + sum(tables) + (0 if residual is None else residual)


AFFINE = Operation(
    "affine_of_a_test", run_affine, cpu=affine_in_torch, dense=affine_in_torch,
    shape=lambda x, **others: torch.empty_like(x), memory_format=torch.contiguous_format,
)  # fmt: skip


@pytest.fixture
def repeat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Calls AFFINE as a GPU would, checks the result, and says how many operations of torch the call ran."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    remembered.cache_clear()
    ran: list[int] = []
    monkeypatch.setattr(AFFINE, "run", lambda **arguments: (ran.append(1), run_affine(**arguments))[1])

    def call(x: Tensor, shift: Tensor, residual: Tensor | None = None, scale: float = 2.0, kind: str = "") -> int:
        ran.clear()
        tables = [torch.ones(8)] if kind == "tables" else []
        given = {"x": x, "shift": shift, "residual": residual, "tables": tables, "scale": scale, "kind": kind}
        y = AFFINE.repeat(*packed("affine", given))
        torch.testing.assert_close(y, affine_in_torch(**given))
        return len(ran)

    yield call
    remembered.cache_clear()


# -- repetition -------------------------------------------------------------------------------------------------------
def test_the_second_call_is_recorded_and_the_third_repeats_it(repeat: Callable[..., int]) -> None:
    shift = torch.randn(8)
    assert [repeat(torch.randn(8), shift) for _ in range(5)] == [1, 1, 0, 0, 0]
    assert [repeat(torch.randn(8), shift, torch.randn(8)) for _ in range(4)] == [1, 1, 0, 0]
    assert [repeat(torch.randn(8), shift, scale=3.0) for _ in range(3)] == [1, 1, 0]
    assert repeat(torch.randn(8), shift) == 0  # none forgot another


@pytest.mark.parametrize("shape", [(9,), (1, 8)], ids=["alignment", "shape"])
def test_other_inputs_are_recorded_apart(repeat: Callable[..., int], shape: tuple[int, ...]) -> None:
    shift = torch.randn(8)
    assert [repeat(torch.randn(8), shift) for _ in range(3)] == [1, 1, 0]
    x = torch.randn(shape)[..., -8:]
    assert [repeat(x, shift) for _ in range(3)] == [1, 1, 0]


def test_the_layout_is_all_but_the_address() -> None:
    x = torch.randn(16)
    others = [x[8:].view(2, 4), x[:8:2], x[1:9], x[:8].half(), x[:8].int(), torch.empty(8, device="meta")]
    layouts = [layout_of(tensor) for tensor in (x[:8], *others)]
    assert len(set(layouts)) == len(layouts) and layout_of(x[8:]) == layouts[0]


def test_constants_are_read_and_not_kept(repeat: Callable[..., int]) -> None:
    shift = torch.randn(8)
    assert [repeat(torch.randn(8), shift) for _ in range(3)] == [1, 1, 0]
    shift.mul_(3)
    assert repeat(torch.randn(8), shift) == 0  # checked: the new values count
    other = torch.randn(8)
    assert [repeat(torch.randn(8), other) for _ in range(3)] == [1, 1, 0]
    alive = weakref.ref(shift)
    del shift
    gc.collect()
    assert alive() is None
    assert repeat(torch.randn(8), other) == 0


def test_constants_used_once_are_not_recorded(repeat: Callable[..., int]) -> None:
    kept = [torch.randn(8) for _ in range(4)]
    assert [repeat(torch.randn(8), shift) for shift in kept] == [1] * 4
    assert remembered.cache_info().currsize == 4 and remembered.cache_info().maxsize == MOST_KINDS


def test_what_cannot_be_repeated_runs_every_time(repeat: Callable[..., int]) -> None:
    shift = torch.randn(8)
    assert [repeat(torch.randn(8), shift, kind="refused") for _ in range(4)] == [1] * 4
    both = torch.randn(16)  # input and residual in one piece of memory
    assert [repeat(both[:8], shift, both[8:]) for _ in range(3)] == [1] * 3


def test_a_capture_is_not_recorded(repeat: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    shift = torch.randn(8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [repeat(torch.randn(8), shift) for _ in range(3)] == [1] * 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [repeat(torch.randn(8), shift) for _ in range(2)] == [1, 0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert repeat(torch.randn(8), shift) == 0


def test_a_call_happens_on_the_gpu_of_its_input(repeat: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        with monkeypatch.context() as within:
            within.setattr(torch.cuda, "current_device", lambda: -1)
            yield

    monkeypatch.setattr(torch.cuda, "device", device)
    shift = torch.randn(8)
    repeat(torch.randn(8), shift)
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    repeat(torch.randn(8), shift)
    assert entered == [torch.device("cpu")]


# -- calls ------------------------------------------------------------------------------------------------------------
def test_packed_arguments_come_back() -> None:
    x, shift, tables = torch.randn(8), torch.randn(8), [torch.randn(2, 3), torch.zeros(4, dtype=torch.int32)]
    given: dict[str, Any] = {
        "x": x, "shift": shift, "residual": None, "tables": tables, "empty": [], "sizes": (3, 3), "scale": 0.1,
        "flag": True, "kind": 'a "quoted" name', "nothing": None,
    }  # fmt: skip
    back = unpacked(*packed("affine", given))
    assert {key: back[key] for key in back if key not in ("x", "shift", "tables")} == {
        "residual": None, "empty": [], "sizes": [3, 3], "scale": 0.1, "flag": True, "kind": 'a "quoted" name',
        "nothing": None,
    }  # fmt: skip
    assert back["x"] is x and back["shift"] is shift and all(a is b for a, b in zip(back["tables"], tables))
    assert unpacked(*packed("affine", {**given, "residual": x}))["residual"] is x


@pytest.mark.parametrize("other", [torch.randn(9), torch.randn(16)[::2], torch.randn(8).half()])
def test_constants_of_another_call_are_refused(other: Tensor) -> None:
    x, residual, _, call = packed("affine", {"x": torch.randn(8), "shift": torch.randn(8)})
    with pytest.raises(ShapeError, match="affine: wanted shift like"):
        unpacked(x, residual, [other], call)
    with pytest.raises(ShapeError, match="affine: wanted shift like"):
        unpacked(x, residual, [], call)


# -- compilers --------------------------------------------------------------------------------------------------------
class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return AFFINE.op(x.relu(), self.shift, x, [torch.ones(8)], 2.0, "")


def test_both_names_are_registered_correctly() -> None:
    x, shift = torch.randn(2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    given = (x, shift, x.detach(), [torch.ones(8)], 2.0, "")
    assert set(torch.library.opcheck(AFFINE.op, given).values()) == {"SUCCESS"}
    call = packed(
        AFFINE.name, dict(zip(AFFINE.parameters, (a.detach() if isinstance(a, Tensor) else a for a in given)))
    )
    assert set(torch.library.opcheck(AFFINE.repeated, call).values()) == {"SUCCESS"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compilers_run_the_operation_that_is_repeated(mode: Callable[[], Any]) -> None:
    from torch._dynamo.backends.common import aot_autograd

    targets: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if "affine" in str(node.target))
        return graph

    layer, x = Affine(), torch.randn(3, 8)
    with mode():
        compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=look))
        torch.testing.assert_close(compiled(x), layer(x))
    assert targets == ["tetris.repeated_affine_of_a_test.default"]


def test_exported_programs_keep_the_arguments_and_their_gradients() -> None:
    layer, x = Affine(), torch.randn(3, 8)
    program = torch.export.export(layer, (x,))
    names = [str(node.target) for node in program.graph.nodes if "affine" in str(node.target)]
    assert names == ["tetris.affine_of_a_test.default"]
    leaf = x.clone().requires_grad_()
    y = program.module()(leaf)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, 2.0 * (x > 0) + 1)


def test_gradients_go_to_who_wants_them() -> None:
    x, shift = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    AFFINE.op(x, shift, None, [], 2.0, "").sum().backward()
    torch.testing.assert_close(shift.grad, torch.full((8,), 3.0))
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not AFFINE.op(leaf, shift, None, [], 2.0, "").requires_grad
    compiled = torch.compile(lambda x: AFFINE.op(x, shift, x, [], 2.0, ""), fullgraph=True, backend="aot_eager")
    compiled(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((3, 8), 3.0))


def test_copies_of_inputs_are_operations_of_the_graph() -> None:
    x = torch.randn(8, 3).t()
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: AFFINE.op(x, torch.ones(8), None, [], 2.0, ""))(x)
    names = [str(node.target) for node in graph.graph.nodes]
    assert any("clone" in name or "contiguous" in name for name in names)
    assert names.index("tetris.repeated_affine_of_a_test.default") == len(names) - 2


def test_all_operations_have_both_names() -> None:
    for op in (ops.block_sparse_conv2d, ops.block_sparse_linear, ops.permute_channels, stem.stem_conv2d):
        assert hasattr(torch.ops.tetris, "repeated_" + op._schema.name.removeprefix("tetris::"))
