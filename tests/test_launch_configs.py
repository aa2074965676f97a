"""A layer's config serves the shapes that its kernel takes with it; every other shape gets the default choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tetris import dispatch
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.layout import BlockLayout

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")


@pytest.fixture
def layout(monkeypatch) -> BlockLayout:
    monkeypatch.setattr(dispatch, "device_info", lambda device: H200)
    return BlockLayout.from_mask(torch.ones(4, 8, dtype=torch.bool), (256, 256), (64, 32))


def test_a_convolution_config_is_used_only_where_it_fits(layout):
    problem = Conv2dProblem(128, 256, 256, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), (64, 32), "float16", 32)
    tuned = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=4, tile_k=32).to_key()

    def launch(problem, key):
        return dispatch.conv2d_launch(problem, layout.indptr, layout.indices, key=key)

    assert launch(problem, tuned).config == tuned
    strange = replace(problem, dtype="float32")  # not without tf32
    assert launch(strange, tuned).config == launch(strange, "").config != tuned
    assert launch(problem, "").schedule, "the Hopper kernel comes with its schedule"


def test_a_linear_config_is_used_only_where_it_fits(layout):
    problem = LinearProblem(4096, 256, 256, (64, 32), "float16", 32)
    tuned = LinearConfig(kernel="hopper", tile_tokens=256).to_key()
    decode = LinearConfig(kernel="decode", tile_tokens=16, tile_out=16, tile_k=256, num_stages=1).to_key()

    def launch(problem, key):
        return dispatch.linear_launch(problem, layout.indptr, layout.indices, key=key)

    assert launch(problem, tuned).config == tuned and launch(problem, tuned).schedule
    strange = replace(problem, dtype="float32")
    assert launch(strange, tuned).config == launch(strange, "").config != tuned
    assert launch(replace(problem, tokens=1), decode).config == decode
    assert launch(problem, decode).config == launch(problem, "").config != decode
