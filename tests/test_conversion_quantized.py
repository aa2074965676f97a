"""prune -> convert(weight_dtype=...) -> verify -> save -> load: the masked model with its weights in one byte."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tetris
from tetris import cli
from tetris.errors import FileFormatError, TetrisError, UnsupportedError
from tetris.models import MLP, LeNet, TransformerBlock
from tetris.quantization import quantized, stored_dtype
from tetris.tolerances import relative_error, tolerance

WEIGHTS = ("int8", "float8_e4m3fn")
ERRORS = {"int8": (1e-3, 1e-2), "float8_e4m3fn": (1e-2, 4e-2)}
"""Relative error of quantised weights: about 1/127/sqrt(12)*3 and 2^-4/sqrt(12)*1.5 of normally distributed ones."""


def pruned_mlp(permutations: str = "shared", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = MLP(32, 64, 48, 10).to(dtype), torch.randn(3, 32).to(dtype)
    options = {"block": (16, 8), "method": "sort", "permutations": permutations, "example_inputs": x}
    return tetris.prune(model, 0.5, **options), x


def layer_weights(model: nn.Module) -> dict[str, torch.dtype]:
    return {n: m.values.dtype for n, m in model.named_modules() if isinstance(m, tetris.BlockSparseLinear)}


@pytest.mark.parametrize("permutations", ["shared", "separate"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_within_the_usual_tolerance_of_the_quantised_masked_model(weights, permutations):
    pruned, x = pruned_mlp(permutations)
    fast = tetris.convert(pruned, example_inputs=x, weight_dtype=weights)
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert report.passed, str(report)
    assert all(check.limit == tolerance(torch.float32) for check in report.layers)
    assert set(layer_weights(fast).values()) == {stored_dtype(weights)}
    low, high = ERRORS[weights]
    assert set(report.quantization) == {*layer_weights(fast), "network"}
    assert all(low < error < high for error in report.quantization.values()), report.quantization
    assert "weight quantisation, relative error: network" in str(report)
    assert f"block-sparse, {weights} weights" in str(fast.conversion)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_untraced_models_and_half_precision(weights):
    pruned, x = pruned_mlp("separate", torch.bfloat16)
    fast = tetris.convert(pruned, weight_dtype=weights)
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert report.passed and fast(x).dtype == torch.bfloat16, str(report)


def test_verify_finds_a_wrong_scale():
    pruned, x = pruned_mlp()
    fast = tetris.convert(pruned, example_inputs=x, weight_dtype="int8")
    name = next(iter(layer_weights(fast)))
    fast.get_submodule(name).scales[0] *= 1.01
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert [check.name for check in report.layers if not check.passed] == [name]


def test_convolutions_keep_their_weights():
    torch.manual_seed(0)
    model, x = LeNet(), torch.randn(2, 1, 28, 28)
    pruned = tetris.prune(model, {"conv2": 0.5, "fc1": 0.5}, block=(10, 5), method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x, weight_dtype="int8")
    assert fast.get_submodule("conv2").values.dtype == torch.float32 and set(layer_weights(fast)) == {"fc1"}
    assert tetris.verify(pruned, fast, example_inputs=x).passed
    only = tetris.prune(model, {"conv2": 0.5}, block=(10, 5), method="sort", example_inputs=x)
    with pytest.raises(TetrisError, match="weight_dtype is for block-sparse linear layers; the model has none"):
        tetris.convert(only, example_inputs=x, weight_dtype="int8")
    with pytest.raises(UnsupportedError, match="wanted 'int8'"):
        tetris.convert(pruned, example_inputs=x, weight_dtype="int4")


def test_a_transformer_block_computes_with_quantised_weights():
    torch.manual_seed(0)
    model, x = TransformerBlock(32).eval(), torch.randn(2, 5, 32)
    pruned = tetris.prune(model, 0.5, block=(16, 8), method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x, weight_dtype="float8_e4m3fn")
    expected = copy.deepcopy(pruned).double()
    from tetris.masking import bake_masks

    bake_masks(expected)
    for name in layer_weights(fast):
        weight = expected.get_submodule(name).weight
        weight.data = quantized(weight, torch.float8_e4m3fn)
    assert relative_error(fast(x), expected(x.double())) < 4 * tolerance(torch.float32)


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_files_keep_the_stored_weights(weights, dtype, tmp_path):
    pruned, x = pruned_mlp(dtype=dtype)
    plain = tetris.save(tetris.convert(pruned, example_inputs=x), tmp_path / "plain.safetensors")
    fast = tetris.convert(pruned, example_inputs=x, weight_dtype=weights)
    path = tetris.save(fast, tmp_path / "fast.safetensors")
    loaded = tetris.load(path)
    assert torch.equal(loaded(x), fast(x)) and layer_weights(loaded) == layer_weights(fast)
    assert all(m.scales.dtype == torch.float32 for m in loaded.modules() if isinstance(m, tetris.BlockSparseLinear))
    assert tetris.verify(pruned, loaded, example_inputs=x).passed
    assert str(loaded.conversion) == str(fast.conversion)
    assert path.stat().st_size < plain.stat().st_size


def header_of(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["tetris"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def test_files_without_quantised_weights_say_nothing_of_them(tmp_path):
    pruned, x = pruned_mlp()
    header, tensors = header_of(tetris.save(tetris.convert(pruned, example_inputs=x), tmp_path / "fast.safetensors"))
    assert "weight_dtype" not in json.dumps(header) and not any("scales" in name for name in tensors)


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_files_whose_tensors_are_of_another_kind_are_refused(stored, tmp_path):
    from safetensors.torch import save_file

    pruned, x = pruned_mlp()
    described = "float8_e4m3fn" if stored is torch.int8 else "int8" if stored is None else None
    path = tetris.save(tetris.convert(pruned, example_inputs=x, weight_dtype=described), tmp_path / "fast.safetensors")
    header, tensors = header_of(path)
    for name in [n for n in tensors if n.endswith(".values")]:
        tensors[name] = torch.zeros_like(tensors[name].float()).to(stored or torch.float32)
    save_file(tensors, path, metadata={"tetris": json.dumps(header)})
    with pytest.raises(FileFormatError, match=r"wanted values as .*; the file holds"):
        tetris.load(path)


def test_the_command_line_takes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "net.py"
    source.write_text(
        "import torch\nfrom torch import nn\n\n\ndef make_model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    options = ["--input", "4,64", "--block", "16", "--method", "sort", "--device", "cpu", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        cli.main(["prune", f"{source}:make_model", *map(str, options), "--weight-dtype", "int8"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "block-sparse, int8 weights" in text and "weight quantisation" in text
    assert set(layer_weights(tetris.load(tmp_path / "out" / "fast.safetensors")).values()) == {torch.int8}
