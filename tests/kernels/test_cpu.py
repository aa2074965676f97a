"""The CPU path against the float64 reference, and how it groups block rows."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import test_conv2d, test_linear
from tests.support.operands import ConvCase, LinearCase, conv2d_operands, linear_operands, random_layout
from tetris import reference
from tetris.errors import TetrisError
from tetris.kernels.cpu import conv2d, linear
from tetris.kernels.cpu.grouping import Channels, CostModel, equal_rows, merge_similar
from tetris.tolerances import relative_error, tolerance

CPU = torch.device("cpu")
CONV_CASES = [case for case, _ in test_conv2d.CASES if case.batch]
LINEAR_CASES = [case for case, _ in test_linear.CASES if 0 not in case.tokens]


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolutions_match_the_reference(case):
    operands = conv2d_operands(case, torch.float32, CPU)
    y = conv2d.block_sparse_conv2d(**operands)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, reference.block_sparse_conv2d(**operands)) <= tolerance(torch.float32)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_layers_match_the_reference(case):
    operands = linear_operands(case, torch.float32, CPU)
    y = linear.block_sparse_linear(**operands)
    assert relative_error(y, reference.block_sparse_linear(**operands)) <= tolerance(torch.float32)


def test_an_empty_batch_gives_an_empty_result():
    operands = conv2d_operands(ConvCase(c_out=48, c_in=32, block=(16, 16), extras=("bias",)), torch.float32, CPU)
    y = conv2d.block_sparse_conv2d(**(operands | {"x": operands["x"][:0]}))
    assert y.shape == (0, *reference.block_sparse_conv2d(**operands).shape[1:])


@pytest.mark.parametrize("pixels", [1, 100, 10**7])
def test_the_expected_size_does_not_change_the_result(pixels):
    case = ConvCase(c_out=160, c_in=80, block=(16, 16), extras=("bias",))
    operands = conv2d_operands(case, torch.float32, CPU)
    pattern = {name: operands[name] for name in ("values", "indptr", "indices", "c_out", "kernel_size")}
    prepared = conv2d.prepare(**pattern, c_in=case.c_in, pixels=pixels)
    y = conv2d.run(prepared, operands["x"], operands["bias"], padding=case.padding)
    assert relative_error(y, reference.block_sparse_conv2d(**operands)) <= tolerance(torch.float32)


def test_unknown_activations_are_refused():
    with pytest.raises(TetrisError, match="wanted none, relu"):
        linear.block_sparse_linear(**linear_operands(LinearCase(activation="tanh"), torch.float32, CPU))


def test_runs_of_channels():
    channels = Channels.of(torch.tensor([4, 5, 6, 1, 2, 9]))
    assert channels.runs == (slice(4, 7), slice(1, 3), slice(9, 10))
    for rows in (1, 10000):  # single channels, copies of runs
        matrix = torch.randn(rows, 12)
        assert torch.equal(channels.take(matrix), matrix[:, channels.indices])


def test_equal_rows_are_found():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert equal_rows(mask) == [[0, 2], [1]]


@pytest.mark.parametrize("call_us", [0.0, 10.0, 1e6])
def test_merging_partitions_the_rows_and_never_costs(call_us):
    mask = random_layout((256, 256), (16, 16), 0.3).to_mask()
    cost = CostModel((16, 16), 9, 200, call_us)

    def total(groups: list[list[int]]) -> float:
        return sum(float(cost(torch.tensor(len(g)), mask[g].any(0).sum())) for g in groups)

    groups = merge_similar(mask, cost)
    assert sorted(row for group in groups for row in group) == list(range(16))
    assert total(groups) <= total(equal_rows(mask))
    if call_us == 1e6:
        assert len(groups) == 1
