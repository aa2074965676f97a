"""Pruning methods, importance and what a user may write for sparsity and block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tetris.errors import ShapeError, TetrisError
from tetris.importance import channel_importance, importance_of
from tetris.models import LeNet
from tetris.pruning import METHODS, BlockPruning, NofMPruning, block_sums, fit_block, keep_largest, pruning_method
from tetris.specs import default_block, prunable_layers, resolve_blocks, resolve_sparsity


def test_block_pruning_keeps_the_largest_blocks():
    importance = torch.zeros(4, 6)
    importance[2:, :3] = 1
    importance[0, 5] = 2
    mask = BlockPruning((2, 3)).keep_mask(importance, 0.5)
    assert mask[2:, :3].all() and mask[:2, 3:].all() and int(mask.sum()) == 12


def test_taps_of_a_channel_pair_share_their_fate():
    mask = BlockPruning((2, 2)).keep_mask(torch.rand(4, 4, 3, 3), 0.5)
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))


def test_tail_blocks_count_what_they_hold():
    assert block_sums(torch.ones(5, 3), (4, 2)).tolist() == [[8.0, 4.0], [2.0, 1.0]]


@pytest.mark.parametrize("structure", sorted(METHODS))
@pytest.mark.parametrize("shape", [(32, 48), (32, 48, 3, 3)])
def test_every_method_keeps_about_what_was_asked_and_beats_its_opposite(structure, shape):
    importance = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mask = pruning_method(structure, (8, 8)).keep_mask(importance, 0.5)
    assert mask.shape == importance.shape and mask.dtype == torch.bool
    assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert importance[mask].sum() > importance[~mask].sum()


@pytest.mark.parametrize(("structure", "dims"), [("filter", (1, 2, 3)), ("channel", (0, 2, 3))])
def test_slices_live_or_die_whole(structure, dims):
    mask = pruning_method(structure, (1, 1)).keep_mask(torch.rand(8, 6, 3, 3), 0.5).float()
    assert set(mask.mean(dims).tolist()) == {0.0, 1.0}


def test_two_of_four_keeps_the_two_largest_of_every_four_inputs():
    mask = NofMPruning(2, 4).keep_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0, 1.0, 9.0]]), 0.9)
    assert mask.tolist() == [[True, False, True, False, True, True]]


def test_ties_are_broken_by_position():
    assert keep_largest(torch.ones(5), 2).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("block", "shape", "fitted"),
    [(32, (64, 3), (32, 2)), (64, (64, 512), (32, 64)), ((64, 32), (512, 512), (64, 32)), (16, (1, 40), (1, 16))],
)
def test_a_block_shrinks_until_a_dimension_holds_two(block, shape, fitted):
    assert fit_block(block, shape) == fitted


@pytest.mark.parametrize("block", [0, -1, (8,), (8, 0), 2.5, "big", True])
def test_bad_blocks_are_named(block):
    with pytest.raises(ShapeError, match="block: wanted"):
        fit_block(block, (64, 64))


def test_importance_is_l1_l2_or_given():
    weight = torch.tensor([[-2.0, 1.0]])
    assert importance_of(weight).tolist() == [[2.0, 1.0]]
    assert importance_of(weight, "l2").tolist() == [[4.0, 1.0]]
    assert importance_of(weight, torch.tensor([[0.0, 5.0]])).tolist() == [[0.0, 5.0]]
    assert channel_importance(torch.ones(2, 3, 3, 3)).tolist() == [[9.0] * 3] * 2


@pytest.mark.parametrize(
    ("weight", "importance", "words"),
    [
        (torch.tensor([[float("nan")]]), "l1", "1 NaN or Inf"),
        (torch.ones(1, 2), "l3", "'l1', 'l2'"),
        (torch.ones(1, 2), torch.ones(2, 1), "shape"),
        (torch.ones(1, 2), -torch.ones(1, 2), ">= 0"),
    ],
)
def test_bad_importance_is_named(weight, importance, words):
    with pytest.raises(TetrisError, match=words):
        importance_of(weight, importance)


# -- specs --------------------------------------------------------------------------------------------------------
LAYERS = dict(prunable_layers(LeNet()))


def test_a_rate_for_all_skips_layers_with_few_channels():
    assert resolve_sparsity(0.7, LAYERS) == {"conv2": 0.7, "fc1": 0.7}
    assert set(resolve_sparsity(0.7, LAYERS, "element")) == set(LAYERS)


def test_dicts_take_patterns_and_later_entries_win():
    assert resolve_sparsity({"*": 0.5, "fc?": 0.8, "conv1": 0}, LAYERS) == {"conv2": 0.5, "fc1": 0.8, "fc2": 0.8}


def test_lists_give_one_rate_a_layer():
    assert resolve_sparsity([0, 0.5, 0.6, 0.7], LAYERS) == {"conv2": 0.5, "fc1": 0.6, "fc2": 0.7}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (1.0, r"\[0, 1\)"),
        (-0.1, r"\[0, 1\)"),
        ("a", "wanted a number"),
        ({"conv9": 0.5}, "'conv9' matches no"),
        ([0.5], "got 1"),
    ],
)
def test_bad_sparsities_are_named(spec, words):
    with pytest.raises(TetrisError, match=words):
        resolve_sparsity(spec, LAYERS)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TetrisError, match="it has none"):
        resolve_sparsity(0.5, prunable_layers(nn.ReLU()))


def test_blocks_come_as_ints_pairs_dicts_or_auto():
    assert resolve_blocks(16, LAYERS)["conv2"] == (16, 16)
    assert resolve_blocks((32, 8), LAYERS)["fc1"] == (32, 8)
    mixed = resolve_blocks({"fc*": 64}, LAYERS)
    assert mixed["fc1"] == (64, 64) and mixed["conv2"] == fit_block(default_block(LeNet().conv2.weight), (50, 20))
    with pytest.raises(TetrisError, match="'auto'"):
        resolve_blocks("best", LAYERS)
