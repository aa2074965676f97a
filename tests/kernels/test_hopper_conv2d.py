"""The Hopper convolution against float64, every compile-time variant on a few random problems. Needs the GPU."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.hopper_conv_variants import BASE, VARIANTS, Variant
from tests.support.moats import nan_outputs
from tests.support.operands import ConvCase, conv2d_operands
from tetris import reference
from tetris.errors import ShapeError, UnsupportedError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem
from tetris.kernels.hopper.conv2d import block_sparse_conv2d, conv2d_schedule
from tetris.kernels.hopper.schedule import round_robin
from tetris.layout import BlockLayout
from tetris.tolerances import relative_error, tolerance

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]


def error(variant: Variant, case: ConvCase, seed: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """The relative error on NaN-moated operands and a NaN-filled, moated output."""
    operands = variant.operands(case, torch.device("cuda"), seed)
    schedule = variant.schedule(case, operands, torch.cuda.get_device_properties(0).multi_processor_count)
    with nan_outputs(monkeypatch):
        y = block_sparse_conv2d(
            **operands, allow_tf32=True, max_pool=variant.max_pool, config=variant.config, schedule=schedule
        )
    expected = reference.block_sparse_conv2d(**operands)
    if variant.max_pool:
        expected = torch.nn.functional.max_pool2d(expected, 2)
    return relative_error(y, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_computes_the_convolution(variant, monkeypatch):
    generator = random.Random(7)
    for seed in range(4):
        case = variant.problem(generator)
        assert error(variant, case, seed, monkeypatch) <= tolerance(getattr(torch, variant.dtype), True), case


def test_a_schedule_of_another_problem_is_refused():
    operands = conv2d_operands(ConvCase(block=(64, 32)), torch.float16, torch.device("cuda"))
    with pytest.raises(ShapeError, match="schedule"):
        block_sparse_conv2d(**operands, config=BASE.config, schedule=round_robin(3, 5, 132).to("cuda"))


def test_permutations_of_single_channels_are_refused():
    operands = conv2d_operands(ConvCase(block=(64, 32), extras=("input",)), torch.float16, torch.device("cuda"))
    with pytest.raises(UnsupportedError, match="in groups only"):
        block_sparse_conv2d(**operands, config=BASE.config)
    operands = conv2d_operands(ConvCase(block=(64, 32), extras=("output",)), torch.float16, torch.device("cuda"))
    with pytest.raises(UnsupportedError, match="in groups only"):
        block_sparse_conv2d(**operands, config=BASE.config)


def test_results_repeat_bit_by_bit():
    """A race would show as results that change."""
    operands = conv2d_operands(
        ConvCase(c_out=256, c_in=256, block=(64, 32), batch=19, height=29, width=29),
        torch.float16,
        torch.device("cuda"),
    )
    first = block_sparse_conv2d(**operands, config=BASE.config)
    assert all(torch.equal(first, block_sparse_conv2d(**operands, config=BASE.config)) for _ in range(20))


def test_taken_tiles_are_all_computed_every_time():
    """The program that asks last clears the counter; many more tiles than programs, uneven rows."""
    kept = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1]]) > 0
    layout = BlockLayout.from_mask(kept, (256, 64), (64, 16))
    problem = Conv2dProblem(
        64, 64, 256, 40, 40, (3, 3), (1, 1), (1, 1), (1, 1), block=(64, 16), dtype="float16", n_blocks=7
    )
    config = Conv2dConfig(kernel="hopper", tile_n=8, tile_h=4, tile_w=16)
    lists = (layout.indptr.cuda(), layout.indices.cuda())
    taken, listed = (conv2d_schedule(*lists, problem, config, 132, "cuda", takes=takes) for takes in (True, False))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(64, 64, 40, 40, device="cuda", generator=generator).half().to(memory_format=torch.channels_last)
    values = torch.randn(7, 9, 64, 16, device="cuda", generator=generator).half() / 24
    geometry = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    arguments = {"c_out": 256, "config": config, **geometry}
    expected = block_sparse_conv2d(x, values, *lists, **arguments, schedule=listed)
    assert taken.takes and not listed.takes
    for _ in range(20):
        assert torch.equal(block_sparse_conv2d(x, values, *lists, **arguments, schedule=taken), expected)
        assert not taken.counters.any()


def test_a_block_row_without_blocks_gets_its_bias():
    layout = BlockLayout.from_mask(torch.tensor([[True, False], [False, False], [True, True]]), (192, 64), (64, 32))
    x = torch.randn(8, 64, 9, 9, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    arguments = {
        "x": x,
        "values": torch.randn(3, 9, 64, 32, device="cuda", dtype=torch.float16) / 24,
        "indptr": layout.indptr.to("cuda"),
        "indices": layout.indices.to("cuda"),
        "bias": torch.randn(192, device="cuda"),
        "c_out": 192,
        **{"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "activation": "relu"},
    }
    y = block_sparse_conv2d(**arguments, config=BASE.config)
    assert relative_error(y, reference.block_sparse_conv2d(**arguments)) <= tolerance(torch.float16)
