"""prune -> convert -> verify -> save -> load over the model zoo: the converted model is the masked model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris.errors import FileFormatError, TetrisError, UnsupportedError
from tetris.models import MLP, VGG16, LanguageModel, LeNet, TransformerBlock, resnet18, resnet50
from tetris.plans import LayerPlan, ModelPlan
from tetris.specs import unprunable_layers
from tetris.tolerances import relative_error, tolerance

ZOO = {
    "lenet": (LeNet, (2, 1, 28, 28)),
    "vgg16": (lambda: VGG16(width=0.125, pooled=1), (2, 3, 32, 32)),
    "vgg16_bn": (lambda: VGG16(width=0.125, pooled=2, batch_norm=True), (1, 3, 64, 64)),
    "resnet18": (lambda: resnet18(width=16), (2, 3, 24, 24)),
    "resnet50": (lambda: resnet50(width=8), (1, 3, 24, 24)),
    "mlp": (lambda: MLP(32, 64, 48, 10), (3, 32)),
    "transformer": (lambda: TransformerBlock(32), (2, 5, 32)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of the zoo with lively batch norms, in evaluation mode, and an input."""
    torch.manual_seed(0)
    build, shape = ZOO[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model, torch.randn(shape)


@functools.cache
def pruned_once(name: str, permutations: str) -> tuple[nn.Module, torch.Tensor]:
    model, x = make(name)
    options = {"method": "sort", "permutations": permutations, "example_inputs": x}
    return tetris.prune(model, 0.6, block=(16, 8), **options), x


def pruned_model(name: str, permutations: str = "shared") -> tuple[nn.Module, torch.Tensor]:
    """A copy of the pruned model of the zoo, which is pruned once for all tests, and an input."""
    model, x = pruned_once(name, permutations)
    return copy.deepcopy(model), x.clone()


@pytest.mark.parametrize("permutations", ["shared", "separate"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_converted_model_is_the_masked_model(name, permutations):
    pruned, x = pruned_model(name, permutations=permutations)
    fast = tetris.convert(pruned, example_inputs=x)
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert report.passed, str(report)
    assert {check.name for check in report.layers} >= set(tetris.masked_layers(pruned)) != set()
    moved = [layer.name for layer in fast.conversion.layers.values() if layer.permutes]
    assert not (permutations == "shared" and moved), f"shared permutations must cost nothing; these move data: {moved}"


@pytest.mark.parametrize("name", ["lenet", "resnet18", "transformer"])
def test_without_tracing_every_layer_permutes_for_itself(name):
    pruned, x = pruned_model(name, permutations="separate")
    fast = tetris.convert(pruned)
    assert relative_error(fast(x), pruned(x)) < tolerance(torch.float32)
    assert type(fast) is type(pruned) and not fast.conversion.traced


def test_untraceable_models_convert_with_a_warning():
    class Branching(MLP):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, x = Branching(32, 64, 32), torch.randn(3, 32)
    with pytest.raises(UnsupportedError, match=r"torch\.fx can trace"):
        tetris.prune(model, 0.5, permutations="shared", example_inputs=x)
    with pytest.warns(UserWarning, match="every layer gets permutations of its own"):
        pruned = tetris.prune(model, 0.5, block=8, method="sort", example_inputs=x)
    with pytest.warns(UserWarning, match="every layer keeps its own permutations"):
        fast = tetris.convert(pruned, example_inputs=x)
    assert relative_error(fast(x), pruned(x)) < tolerance(torch.float32)


def test_epilogues_swallow_norms_residuals_activations_and_pools():
    pruned, x = pruned_model("vgg16_bn")
    layers = tetris.convert(pruned, example_inputs=x).conversion.layers
    assert layers["features.10"].batch_norm == "features.11"
    assert layers["features.10"].fused == ["relu", "2x2 max-pool"]
    pruned, x = pruned_model("resnet18")
    fast = tetris.convert(pruned, example_inputs=x)
    assert fast.conversion.layers["layer1.0.conv2"].fused == ["residual", "relu"]
    assert "batch norm, residual, relu" in str(fast.conversion)
    unfused = tetris.convert(pruned, example_inputs=x, fuse=False)
    assert not any(layer.fused or layer.batch_norm for layer in unfused.conversion.layers.values())
    assert relative_error(unfused(x), pruned(x)) < tolerance(torch.float32)


@pytest.mark.parametrize("permutations", ["shared", "separate"])
def test_embeddings_follow_the_stream_though_the_head_shares_their_weight(permutations, tmp_path):
    torch.manual_seed(0)
    model, x = LanguageModel().eval(), torch.randint(256, (2, 7))
    options = {"method": "sort", "permutations": permutations, "example_inputs": x}
    pruned = tetris.prune(model, {"blocks.*": 0.6}, block=8, **options)
    fast = tetris.convert(pruned, example_inputs=x)
    assert tetris.verify(pruned, fast, x).passed and model.head.weight is model.tokens.weight
    order = fast.conversion.layers["blocks.0.q_proj"].input_order
    assert torch.equal(fast.tokens.weight, model.tokens.weight[:, order])
    loaded = tetris.load(tetris.save(fast, tmp_path / "model.safetensors"))
    torch.testing.assert_close(loaded(x), fast(x))


@pytest.mark.parametrize("permutations", ["shared", "separate"])
def test_dense_shortcuts_give_their_bias_to_the_layer_that_adds_them(permutations):
    model, x = make("resnet18")
    options = {"method": "sort", "permutations": permutations, "example_inputs": x}
    pruned = tetris.prune(model, {"layer*.conv*": 0.6}, block=(16, 8), **options)
    fast = tetris.convert(pruned, example_inputs=x)
    assert fast.conversion.layers["layer2.0.conv2"].bias_of == "layer2.0.downsample.0"
    assert fast.get_submodule("layer2.0.downsample.0").bias is None
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert report.passed, str(report)


def test_dense_linear_shortcuts_give_their_bias_too():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.straight, self.layer = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)

        def forward(self, x):
            return self.straight(x) + self.layer(x)

    model, x = Shortcut().eval(), torch.randn(3, 32)
    pruned = tetris.prune(model, {"layer": 0.5}, block=8, method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x)
    assert fast.conversion.layers["layer"].bias_of == "straight" and fast.straight.bias is None
    assert tetris.verify(pruned, fast, x).passed


def test_layers_can_stay_dense():
    pruned, x = pruned_model("lenet")
    fast = tetris.convert(pruned, example_inputs=x, dense=["conv*"])
    assert fast.conversion.layers["conv2"].reason == "chosen dense" and isinstance(
        fast.get_submodule("conv2"), nn.Conv2d
    )
    assert tetris.verify(pruned, fast, example_inputs=x).passed


def test_conversion_changes_neither_model():
    pruned, x = pruned_model("vgg16_bn")
    before, state = pruned(x), copy.deepcopy(pruned.state_dict())
    fast = tetris.convert(pruned, example_inputs=x)
    fast(x)
    assert torch.equal(pruned(x), before)
    assert all(torch.equal(v, state[k]) for k, v in pruned.state_dict().items() if isinstance(v, torch.Tensor))


def test_other_batches_and_dtypes_run_through_the_same_model():
    pruned, x = pruned_model("vgg16")
    fast = tetris.convert(pruned, example_inputs=x)
    bigger = torch.randn(5, *x.shape[1:])
    assert relative_error(fast(bigger), pruned(bigger)) < tolerance(torch.float32)
    half = pruned.bfloat16()
    fast = tetris.convert(half, example_inputs=x.bfloat16())
    assert tetris.verify(half, fast, example_inputs=x.bfloat16()).passed


def test_verify_finds_a_corrupted_layer():
    pruned, x = pruned_model("lenet")
    fast = tetris.convert(pruned, example_inputs=x)
    values = fast.get_submodule("fc1").values
    with torch.no_grad():
        values[0] += 0.1
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert not report and [c.name for c in report.layers if not c.passed] == ["fc1"] and "FAILED" in str(report)
    with torch.no_grad():
        values[0] = float("nan")
    assert not tetris.verify(pruned, fast, example_inputs=x).outputs[0].passed


class InPlace(nn.Module):
    """Two convolutions whose results are changed in place by operations that no epilogue does, and two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.again = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x):
        y = F.hardswish(self.again(self.norm(self.a(x))), inplace=True)
        return F.leaky_relu_(self.b(y) + y)


def test_verify_sees_layers_before_what_follows_changes_them_in_place():
    model, x = InPlace(), torch.randn(2, 8, 9, 9)
    for norm in (model.norm, model.again):
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.uniform_(-1.0, 1.0)
    pruned = tetris.prune(model.eval(), {"a": 0.5, "b": 0.5}, block=4, method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x)
    assert fast.conversion.layers["a"].batch_norm == "norm" and fast.conversion.layers["b"].fused == ["residual"]
    report = tetris.verify(pruned, fast, example_inputs=x)
    assert report.passed, str(report)


class Casting(MLP):
    """Bytes in; casts on the way, and a tensor of its own if asked."""

    own: torch.dtype | None = None

    def forward(self, x):
        x = (x.float() / 255).to(torch.float32)
        return super().forward(x if self.own is None else torch.ones(3, 32, dtype=self.own))


def test_verify_runs_models_with_casts_in_float64_and_says_when_one_does_not():
    model, x = Casting(32, 64, 32), torch.randint(256, (3, 32), dtype=torch.uint8)
    pruned = tetris.prune(model, 0.5, block=8, method="sort", example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x)
    assert tetris.verify(pruned, fast, example_inputs=x)
    pruned.own = torch.float32
    with pytest.raises(TetrisError, match=r"Casting failed .*look for tensors that its forward makes"):
        tetris.verify(pruned, fast, example_inputs=x)


def test_verify_wants_a_converted_model():
    pruned, x = pruned_model("lenet")
    with pytest.raises(TetrisError, match=r"tetris\.convert; got LeNet"):
        tetris.verify(pruned, LeNet(), example_inputs=x)


@pytest.mark.parametrize("structure", ["none at all", "element"])
def test_convert_wants_blocks(structure):
    model, x = make("lenet")
    if structure == "element":
        model = tetris.prune(model, 0.5, structure="element")
    with pytest.raises(TetrisError, match="pruned by blocks; got none"):
        tetris.convert(model, example_inputs=x)


def test_what_no_kernel_computes_in_is_refused_by_name():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).double()
    x = torch.randn(3, 32, dtype=torch.float64)
    pruned = tetris.prune(model, 0.5, block=8, method="sort", example_inputs=x)
    with pytest.raises(UnsupportedError, match=r"convert: 0: .*float16, bfloat16 or float32; got .*float64"):
        tetris.convert(pruned, example_inputs=x)


def test_layers_that_cannot_be_pruned_are_listed_with_the_reason():
    attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    convs = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=4)
    model = nn.Sequential(*convs, nn.Flatten(2), nn.Linear(36, 32), attention)
    x = torch.randn(2, 3, 10, 10)
    pruned = tetris.prune(model.eval(), {"3": 0.5, "4.linear*": 0.5}, block=8, method="sort", permutations="separate")
    fast = tetris.convert(pruned)
    layers = fast.conversion.layers
    assert layers["1"].reason == "4 groups" and layers["4.self_attn.out_proj"].reason.startswith("the attention reads")
    assert not layers["3"].reason and tetris.verify(pruned, fast, x)
    mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    others = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.Embedding(3, 4), nn.Linear(4, 4), mirrored)
    assert unprunable_layers(others) == {
        "0": "no block-sparse form of ConvTranspose2d", "1": "no block-sparse form of Embedding",
        "3": "padding (1, 1), reflect",
    }  # fmt: skip


def test_convert_wants_a_module():
    with pytest.raises(TetrisError, match=r"wanted an nn\.Module; got str 'net'"):
        tetris.convert("net")  # type: ignore[arg-type]


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("permutations", ["shared", "separate"])
@pytest.mark.parametrize("name", ["lenet", "vgg16_bn", "resnet18", "mlp", "transformer"])
def test_a_saved_model_loads_without_its_code(name, permutations, tmp_path):
    pruned, x = pruned_model(name, permutations=permutations)
    fast = tetris.convert(pruned, example_inputs=x)
    loaded = tetris.load(tetris.save(fast, tmp_path / "fast.safetensors"))
    assert torch.equal(loaded(x), fast(x))
    assert tetris.verify(pruned, loaded, example_inputs=x).passed
    assert str(loaded.conversion) == str(fast.conversion)


def test_an_untraced_model_needs_its_architecture(tmp_path):
    pruned, x = pruned_model("lenet", permutations="separate")
    fast = tetris.convert(pruned)
    path = tetris.save(fast, tmp_path / "fast.safetensors")
    assert torch.equal(tetris.load(path, LeNet())(x), fast(x))
    with pytest.raises(TetrisError, match=r"tetris\.load\(path, model="):
        tetris.load(path)
    with pytest.raises(FileFormatError, match="do not match the model"):
        tetris.load(path, VGG16(width=0.125))


def test_bad_files_are_refused(tmp_path, monkeypatch):
    pruned, x = pruned_model("lenet")
    path = tetris.save(tetris.convert(pruned, example_inputs=x), tmp_path / "fast.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="wanted to load to cuda:0; this machine"):
        tetris.load(path, device="cuda:0")
    with pytest.raises(FileFormatError, match="no such file"):
        tetris.load(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="corrupt"):
        tetris.load(path)
    from safetensors.torch import save_file

    save_file({"x": x}, path)
    with pytest.raises(FileFormatError, match="without its header"):
        tetris.load(path)
    save_file({"x": x}, path, metadata={"tetris": '{"format": "tetris-model", "version": 99}'})
    with pytest.raises(FileFormatError, match="version 99"):
        tetris.load(path)


def test_a_file_cannot_name_arbitrary_functions(tmp_path):
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    pruned, x = pruned_model("lenet")
    path = tetris.save(tetris.convert(pruned, example_inputs=x), tmp_path / "fast.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tetris"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for target in ("builtins.eval", "os.system", "torch.load", "getattr"):
        bad = copy.deepcopy(header)
        next(n for n in bad["graph"] if n["op"] == "call_function")["target"] = target
        save_file(tensors, path, metadata={"tetris": json.dumps(bad)})
        with pytest.raises(FileFormatError, match="not an allowed function"):
            tetris.load(path)


def test_save_wants_a_converted_model(tmp_path):
    with pytest.raises(TetrisError, match=r"tetris\.convert"):
        tetris.save(LeNet(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_plan_that_leaves_everything_dense_goes_through():
    model, x = make("lenet")
    plan = ModelPlan((LayerPlan("fc1", "linear", (500, 800)),))
    pruned = tetris.prune(model, plan=plan, example_inputs=x)
    fast = tetris.convert(pruned, example_inputs=x, plan=plan)
    assert not tetris.masked_layers(pruned) and relative_error(fast(x), model(x)) < tolerance(torch.float32)


def test_converting_and_running_in_inference_mode():
    pruned, x = pruned_model("mlp")
    with torch.inference_mode():
        fast = tetris.convert(pruned, example_inputs=x)
        y = fast(x)
    assert relative_error(y, pruned(x)) < tolerance(torch.float32)
