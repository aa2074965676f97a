"""The sweep's variants: their kernels take all of their problems, and some of them run without a Hopper GPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.linear_variants import PERMUTING, VARIANTS
from tests.support.fake_gpu import H200
from tests.support.operands import linear_problem, random_layout
from tetris.kernels.linear_paths import linear_refuses
from tetris.tolerances import tolerance


def test_every_kernel_takes_its_random_problems():
    for variant in VARIANTS:
        generator = random.Random(str(variant))
        for _ in range(20):
            case = variant.problem(generator)
            layout = random_layout((case.out_features, case.in_features), case.block, case.kept)
            operands = {"x": torch.empty(0, dtype=getattr(torch, variant.dtype)), "values": layout.indices}
            assert linear_refuses(linear_problem(case, operands), H200, variant.config) is None, (variant, case)
    assert len(VARIANTS) == len(set(map(str, VARIANTS)))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.config.kernel in PERMUTING and v.block == (64, 16)], ids=str
)
def test_a_problem_of_a_variant(variant, device, monkeypatch):
    case = variant.problem(random.Random(3))
    case = replace(case, out_features=72, in_features=136, tokens=(min(case.tokens[0], 9),))
    assert variant.error(case, 5, device, monkeypatch) <= tolerance(getattr(torch, variant.dtype))
