"""The drop-in layers and the registered operations behind them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tetris
from tetris import ops
from tetris.errors import ShapeError, UnsupportedError
from tetris.layers import supported_padding
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.permutation import inverse
from tetris.tolerances import relative_error, tolerance

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def conv_pair(block=(16, 8), **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(40, 50, 3, **options)
    r = tetris.reorder(conv.weight, block, 0.6)
    masked = copy.deepcopy(conv)
    masked.weight.data *= r.keep_mask
    return conv, masked, r


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": "same"},
        {"stride": 2, "padding": (1, 0)},
        {"dilation": 2},
        {"bias": False, "padding": "valid"},
    ],
)
def test_conv_equals_the_masked_convolution(options):
    conv, masked, r = conv_pair(**options)
    layer, x = tetris.BlockSparseConv2d.from_dense(conv, r), torch.randn(2, 40, 11, 13)
    with torch.no_grad():
        y = layer(x)
        assert relative_error(y, masked(x)) < tolerance(torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.dense_weight(), masked.weight)
    assert (layer.dense_bias() is None) == (conv.bias is None)


def test_linear_equals_the_masked_layer_with_any_leading_dimensions():
    linear = nn.Linear(40, 50)
    r = tetris.reorder(linear.weight, (16, 8), 0.6)
    layer = tetris.BlockSparseLinear.from_dense(linear, r, activation="gelu")
    masked = copy.deepcopy(linear)
    masked.weight.data *= r.keep_mask
    for shape in [(40,), (3, 40), (2, 3, 40)]:
        x = torch.randn(shape)
        if len(shape) == 1:
            with pytest.raises(ShapeError, match=r"\[N, \.\.\., C_IN\]"):
                layer(x)
        else:
            assert relative_error(layer(x), nn.functional.gelu(masked(x))) < tolerance(torch.float32)
    assert torch.equal(layer.dense_weight(), masked.weight) and torch.equal(layer.dense_bias(), linear.bias)


def test_residual_activation_and_pool_in_order():
    conv, masked, r = conv_pair(padding=1)
    layer = tetris.BlockSparseConv2d.from_dense(conv, r, activation="relu")
    layer.max_pool = True
    x, residual = torch.randn(2, 40, 8, 8), torch.randn(2, 50, 8, 8)
    expected = nn.functional.max_pool2d(torch.relu(masked(x) + residual), 2)
    assert relative_error(layer(x, residual), expected) < tolerance(torch.float32)


def test_given_orders_replace_the_own_permutations():
    conv, masked, r = conv_pair()
    layer = tetris.BlockSparseConv2d.from_dense(conv, r, input_permutation=None, output_permutation=None)
    x = torch.randn(1, 40, 6, 6)
    assert layer.input_permutation is None is layer.output_permutation
    y = layer(x[:, r.permutations[1]])
    assert relative_error(y, masked(x)[:, r.permutations[0]]) < tolerance(torch.float32)


def test_empty_block_rows_compute_the_bias():
    linear = nn.Linear(32, 32)
    linear.weight.data[:16] = 0
    layer = tetris.BlockSparseLinear.from_dense(linear, tetris.reorder(linear.weight, (16, 16), 0.6, method="none"))
    x = torch.randn(3, 32)
    assert layer.kept_fraction == 0.5 and layer.n_blocks == 3
    assert torch.allclose(layer(x)[:, :16], linear.bias[:16].expand(3, 16))


def test_the_cpu_path_notices_new_values_moves_and_copies():
    conv, _, r = conv_pair()
    layer, x = tetris.BlockSparseConv2d.from_dense(conv, r), torch.randn(1, 40, 6, 6)
    y = layer(x)
    clone = pickle.loads(pickle.dumps(layer))
    assert torch.equal(clone(x), y)
    layer.values.data *= 2
    layer.bias.data *= 2
    layer.values.data = layer.values.data.clone()
    assert relative_error(layer(x), 2 * y) < 1e-6
    layer.load_state_dict(clone.state_dict())
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.to(memory_format=torch.channels_last)(x), y)
    assert relative_error(layer.double().float()(x), y) < 1e-6


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradients_equal_the_masked_layers(kind):
    torch.manual_seed(0)
    dense = nn.Conv2d(24, 20, 3, padding=1) if kind == "conv" else nn.Linear(24, 20)
    r = tetris.reorder(dense.weight, (8, 8), 0.5)
    make = tetris.BlockSparseConv2d if kind == "conv" else tetris.BlockSparseLinear
    layer = make.from_dense(dense, r, activation="silu").requires_grad_()
    dense.weight.data *= r.keep_mask
    x = torch.randn((2, 24, 6, 6) if kind == "conv" else (5, 24), requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    residual = torch.randn_like(dense(x)).requires_grad_()
    layer(x, residual).square().sum().backward()
    expected_residual = residual.grad.clone()
    residual.grad = None
    nn.functional.silu(dense(x2) + residual).square().sum().backward()
    ordered = dense.weight.grad[r.permutations[0]][:, r.permutations[1]]
    assert relative_error(x.grad, x2.grad) < 1e-5 and relative_error(expected_residual, residual.grad) < 1e-5
    assert relative_error(layer.values.grad, pack(ordered, layer.layout).reshape_as(layer.values)) < 1e-5
    assert relative_error(layer.bias.grad, dense.bias.grad[r.permutations[0]]) < 1e-5


def operands(kind: str):
    torch.manual_seed(0)
    layout = BlockLayout.from_mask(torch.rand(5, 3) > 0.3, (20, 24), (4, 8)).without_empty_rows()
    weight = torch.randn((20, 24, 3, 3) if kind == "conv" else (20, 24))
    x = torch.randn((2, 24, 8, 8) if kind == "conv" else (3, 5, 24), device=DEVICE, requires_grad=True)
    bias = torch.randn(20, device=DEVICE, requires_grad=True)
    p, q = torch.randperm(24, device=DEVICE), torch.randperm(20, device=DEVICE)
    values = pack(weight, layout).to(DEVICE).requires_grad_()
    tensors = (x, values, layout.indptr.to(DEVICE), layout.indices.to(DEVICE), bias, None, p, q, [])
    if kind == "conv":
        return ops.block_sparse_conv2d, (*tensors, 20, [3, 3], [1, 1], [1, 1], [1, 1], "relu", True, False, "")
    return ops.block_sparse_linear, (*tensors, 20, "gelu", False, "", None)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_operations_are_registered_correctly(kind):
    op, arguments = operands(kind)
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_permutation_is_registered_correctly_and_differentiable():
    x = torch.randn(2, 6, 4, 4, device=DEVICE, requires_grad=True)
    p = torch.randperm(6, device=DEVICE)
    assert set(torch.library.opcheck(ops.permute_channels, (x, p, 1)).values()) == {"SUCCESS"}
    (ops.permute_channels(x, p, 1) * torch.arange(6.0, device=DEVICE)[:, None, None]).sum().backward()
    assert torch.equal(
        x.grad[0, :, 0, 0], torch.empty(6, device=DEVICE).index_put_((p,), torch.arange(6.0, device=DEVICE))
    )


@pytest.mark.slow
def test_a_converted_model_compiles_as_one_graph_and_exports():
    from tetris.models import MLP

    model, x = MLP(32, 64, 32), torch.randn(3, 32)
    pruned = tetris.prune(model, 0.5, block=8, method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    outputs = compiled(x), torch.export.export(fast, (x,)).module()(x)  # convert has called it once
    assert all(relative_error(y, fast(x)) < 1e-6 for y in outputs)
    with pytest.raises(UnsupportedError, match=r"a first call before torch\.export"):
        torch.export.export(copy.deepcopy(fast), (x,))


# -- bad input --------------------------------------------------------------------------------------------------------
def test_wrong_inputs_are_named():
    conv, _, r = conv_pair()
    layer = tetris.BlockSparseConv2d.from_dense(conv, r)
    with pytest.raises(ShapeError, match=r"C_IN = 40; got tensor of shape \(1, 41, 6, 6\)"):
        layer(torch.randn(1, 41, 6, 6))
    with pytest.raises(ShapeError, match=r"\[N, C_IN, H, W\]"):
        layer(torch.randn(40, 6, 6))
    with pytest.raises(UnsupportedError, match=r"float16 on cpu.*convert one"):
        layer(torch.randn(1, 40, 6, 6).half())


def test_layers_refuse_what_they_are_not_for():
    conv, _, r = conv_pair()
    with pytest.raises(UnsupportedError, match=r"wanted an nn\.Conv2d; got Linear"):
        tetris.BlockSparseConv2d.from_dense(nn.Linear(3, 3), r)
    with pytest.raises(UnsupportedError, match=r"wanted an nn\.Linear; got Conv2d"):
        tetris.BlockSparseLinear.from_dense(conv, r)
    with pytest.raises(ShapeError, match="the reordering is for"):
        tetris.BlockSparseConv2d.from_dense(nn.Conv2d(8, 8, 3), r)
    with pytest.raises(UnsupportedError, match="groups=2"):
        supported_padding(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedError, match="padding_mode='reflect'"):
        supported_padding(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(UnsupportedError, match="odd effective kernel"):
        supported_padding(nn.Conv2d(4, 4, 2, padding="same"))
    elements = tetris.reorder(conv.weight, 8, 0.5, method="none", structure="element")
    with pytest.raises(UnsupportedError, match="structure='block'"):
        tetris.BlockSparseConv2d.from_dense(conv, elements)


def test_the_inverse_of_the_output_permutation_follows_what_is_loaded() -> None:
    linear = nn.Linear(32, 48)
    reordering = tetris.reorder(linear.weight, 8, 0.5, "sort")
    layer = tetris.BlockSparseLinear.from_dense(linear, reordering)
    assert torch.equal(layer._output_gather, inverse(reordering.permutations[0]))
    other = {**layer.state_dict(), "output_permutation": layer.output_permutation.roll(1)}
    layer.load_state_dict(other)
    assert torch.equal(layer._output_gather, inverse(reordering.permutations[0].roll(1)))
    alone = tetris.BlockSparseLinear.from_dense(linear, reordering, output_permutation=None)
    assert alone._output_gather is None and "_output_gather" not in layer.state_dict()
