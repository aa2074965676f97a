"""``BlockSparseLinear`` with weights in one byte: what it computes, keeps, prints and refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import tetris
from tests.support.fake_gpu import A100, H200
from tests.support.operands import random_layout
from tetris import dispatch, ops
from tetris.autotune.problems import problem_of, size_bytes
from tetris.autotune.space import config_space
from tetris.errors import UnsupportedError
from tetris.kernels.configs import DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.linear_paths import choose_linear_config, refuses_weights
from tetris.quantization import quantized, stored_dtype
from tetris.tolerances import relative_error, tolerance

WEIGHTS = ("int8", "float8_e4m3fn")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(weights: str, **options) -> tuple[tetris.BlockSparseLinear, nn.Linear]:
    """A layer, and the dense one with its dequantised weights in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 50)
    r = tetris.reorder(linear.weight, (16, 8), 0.6)
    layer = tetris.BlockSparseLinear.from_dense(linear, r, weight_dtype=weights, **options)
    exact = copy.deepcopy(linear).double()
    exact.weight.data = quantized(linear.weight * r.keep_mask, stored_dtype(weights))
    return layer.to(DEVICE), exact.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_layer_computes_with_dequantised_weights(weights, dtype):
    layer, exact = make(weights, activation="gelu")
    x, residual = torch.randn(3, 5, 40, device=DEVICE, dtype=dtype), torch.randn(3, 5, 50, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        expected = nn.functional.gelu(exact(x.double()) + residual.double())
        assert relative_error(layer(x, residual), expected) < tolerance(dtype)
    assert relative_error(layer.dense_weight(), exact.weight) < 1e-7
    assert layer.values.dtype == stored_dtype(weights) and layer.values.element_size() == 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_change_of_dtype_leaves_the_stored_weights_alone(weights):
    layer, exact = make(weights)
    layer.bias.data.zero_()  # a bias is rounded with the model
    exact.bias.data.zero_()
    stored, scales, x = layer.values.clone(), layer.scales.clone(), torch.randn(3, 40, device=DEVICE)
    for changed in (layer.half(), layer.double(), layer.bfloat16()):
        assert torch.equal(changed.values.float(), stored.float()) and torch.equal(changed.scales, scales)
        assert changed.values.dtype == stored.dtype and changed.bias.dtype != torch.float32
    layer.float()
    assert relative_error(layer(x), exact(x.double())) < tolerance(torch.float32)
    assert {name for name, _ in layer.named_parameters()} == {"bias"}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_copies_compute_the_same(weights):
    layer, _ = make(weights)
    x = torch.randn(3, 40, device=DEVICE)
    fresh = tetris.BlockSparseLinear(40, 50, (16, 8), layer.n_blocks, weight_dtype=weights, device=DEVICE)
    fresh.register_buffer("input_permutation", layer.input_permutation.clone())
    fresh.register_buffer("output_permutation", layer.output_permutation.clone())
    fresh.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for clone in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
        assert torch.equal(clone(x), layer(x))


def test_the_cpu_path_notices_new_scales_and_other_dtypes():
    layer, exact = make("int8")
    layer, exact, x = layer.cpu(), exact.cpu(), torch.randn(3, 40)
    before = layer(x)
    assert relative_error(layer(x.bfloat16()), exact(x.bfloat16().double())) < tolerance(torch.bfloat16)
    layer.scales *= 2
    layer.bias.data *= 2
    assert relative_error(layer(x), 2 * before) < 1e-6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_are_those_of_the_dequantised_weights(weights):
    layer, exact = make(weights, activation="silu")
    layer.requires_grad_()
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    x2 = x.detach().double().requires_grad_()
    layer(x).square().sum().backward()
    nn.functional.silu(exact(x2)).square().sum().backward()
    assert relative_error(x.grad, x2.grad) < 1e-5
    order = layer.output_permutation
    assert relative_error(layer.bias.grad, exact.bias.grad if order is None else exact.bias.grad[order]) < 1e-5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_operation_is_registered_correctly(weights):
    layer, _ = make(weights)
    x = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    lists = (x, layer.blocks, layer.indptr, layer.indices, layer.bias, None, None, layer.output_permutation, [])
    arguments = (*lists, 50, "gelu", False, "", layer.scales)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] if weights == "int8" else []  # which compares inputs; torch compares no float8
    results = torch.library.opcheck(ops.block_sparse_linear, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_compiles_as_one_graph(weights):
    layer, _ = make(weights)
    x = torch.randn(3, 40, device=DEVICE)
    y = layer(x)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y) < 1e-6


def test_it_prints_its_weights():
    layer, _ = make("int8")
    assert ", weights=int8" in repr(layer) and layer.weight_dtype == "int8"
    plain = tetris.BlockSparseLinear(40, 50, (16, 8), 3)
    assert "weights" not in repr(plain) and plain.weight_dtype == ""


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_unknown_weights_are_refused():
    with pytest.raises(UnsupportedError, match=r"weight_dtype: wanted 'int8'.*got 'int4'"):
        make("int4")


@pytest.mark.parametrize(("device", "fits"), [(H200, True), (A100, False)], ids=["H200", "A100"])
def test_float8_needs_hardware_that_converts_it(device, fits):
    problem = LinearProblem(1, 64, 64, (16, 16), "float16", 4, "float8_e4m3fn")
    if fits:
        assert ops.linear_config(problem, device, "").kernel == "portable"
    else:
        with pytest.raises(UnsupportedError, match=r"compute capability 8\.9.*NVIDIA A100 has \(8, 0\).*'int8'"):
            ops.linear_config(problem, device, "")
    amd = DeviceInfo("AMD Instinct MI300X", (9, 4), 304, "3.6.0", backend="hip")
    assert "NVIDIA" in str(refuses_weights("float8_e4m3fn", amd))
    assert refuses_weights("int8", amd) is refuses_weights("int8", device) is refuses_weights("", amd) is None


# -- choosing and tuning ----------------------------------------------------------------------------------------------
def test_the_tuner_knows_the_stored_weights():
    layer, _ = make("int8")
    problem = problem_of(layer, torch.zeros(3, 40))
    assert problem == LinearProblem(3, 40, 50, (16, 8), "float32", layer.n_blocks, "int8")
    assert size_bytes(problem) == 4 * 3 * 90 + layer.n_blocks * 16 * 8


@pytest.mark.parametrize("tokens", [1, 16, 128, 8192])
def test_only_kernels_that_take_stored_weights_are_chosen(tokens):
    problem = LinearProblem(tokens, 4096, 4096, (64, 64), "float16", 1106, "int8")
    assert choose_linear_config(problem, H200).kernel != "hopper"
    kernels = {config.kernel for config in config_space(problem, H200)}
    assert {"portable"} <= kernels <= {"portable", "split", "decode", "vector"}
    layout = random_layout((4096, 4096), (64, 64), 0.27)
    given = LinearConfig(kernel="hopper", tile_tokens=128).to_key()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "device_info", lambda device: H200)
        launch = dispatch.linear_launch(problem, layout.indptr, layout.indices, key=given)
    assert LinearConfig.from_key(launch.config).kernel in kernels
