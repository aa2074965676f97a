"""Permutations, block layouts and the packed format: the data that every kernel reads."""

from __future__ import annotations

import pytest
import torch

from tetris import permutation as perm
from tetris.errors import ShapeError
from tetris.layout import BlockLayout, grid_shape
from tetris.packing import pack, unpack
from tetris.pruning import expand_block_mask


def test_group_size_finds_whole_groups():
    groups = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    channels = (groups[:, None] * 16 + torch.arange(16)).reshape(-1)
    assert perm.group_size(channels) == 16
    assert perm.group_size(torch.arange(48)) == 16 and perm.group_size(torch.arange(7)) == 1
    assert perm.group_size(channels.roll(8)) == 8  # they begin at odd multiples of 8
    assert perm.group_size(torch.arange(64).flip(0)) == 1


def test_inverse_undoes_and_compose_chains():
    p, q = torch.randperm(17), torch.randperm(17)
    x = torch.randn(17)
    assert torch.equal(x[p][perm.inverse(p)], x)
    assert torch.equal(x[p][q], x[perm.compose(p, q)])
    assert perm.is_identity(p[perm.inverse(p)]) and not perm.is_identity(torch.tensor([1, 0]))


def test_expand_moves_whole_channels():
    x = torch.arange(12).view(4, 3)
    p = torch.tensor([2, 0, 3, 1])
    assert torch.equal(x.flatten()[perm.expand(p, 3)], x[p].flatten())


@pytest.mark.parametrize("bad", [[0, 1, 1], [0, 1], [0, 1, 3], [[0, 1, 2]]])
def test_validate_refuses_what_is_no_bijection(bad):
    with pytest.raises(ShapeError, match="wanted"):
        perm.validate(torch.tensor(bad), 3)


def test_layout_round_trips_a_mask():
    mask = torch.rand(5, 7) > 0.6
    layout = BlockLayout.from_mask(mask, (70, 100), (16, 16))
    assert torch.equal(layout.to_mask(), mask)
    assert layout.n_blocks == int(mask.sum()) and layout.kept_fraction == pytest.approx(float(mask.float().mean()))
    assert torch.equal(layout.rows, mask.nonzero()[:, 0])


def test_layout_refuses_a_mask_of_another_grid():
    with pytest.raises(ShapeError, match=r"\(5, 7\)"):
        BlockLayout.from_mask(torch.ones(4, 7, dtype=torch.bool), (70, 100), (16, 16))


def test_empty_rows_get_one_block_and_the_others_none():
    mask = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    filled = BlockLayout.from_mask(mask, (12, 12), (4, 4)).without_empty_rows().to_mask()
    assert torch.equal(filled[[0, 2]], mask[[0, 2]])
    assert filled[1].tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(64, 48), (70, 50), (70, 50, 3, 3), (9, 5, 1, 1), (33, 64, 5, 3)])
@pytest.mark.parametrize("block", [(16, 16), (32, 8), (25, 7)])
def test_unpack_inverts_pack_at_ragged_shapes(shape, block):
    mask = torch.rand(grid_shape(shape[:2], block)) > 0.5
    layout = BlockLayout.from_mask(mask, shape[:2], block)
    weight = torch.randn(shape) * expand_block_mask(mask, shape, block)
    values = pack(weight, layout)
    taps = () if len(shape) == 2 else (shape[2] * shape[3],)
    assert values.shape == (layout.n_blocks, *taps, *block) and values.is_contiguous()
    assert torch.equal(unpack(values, layout, shape[2:]), weight)


def test_pack_orders_taps_row_by_row():
    weight = torch.arange(2 * 2 * 3 * 3.0).view(2, 2, 3, 3)
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), (2, 2), (2, 2))
    assert torch.equal(pack(weight, layout)[0, 5], weight[:, :, 1, 2])


def test_pack_refuses_other_channels():
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), (2, 2), (2, 2))
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        pack(torch.randn(3, 2), layout)
