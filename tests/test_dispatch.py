"""From a layer to a launch: configs, schedules, and which implementation runs, with a GPU's facts but without one."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch

import tetris
from tests.support.fake_gpu import A100, H200
from tetris import dispatch, ops, reference, stem
from tetris.bench.cases import random_layout
from tetris.dispatch import Launch, conv2d_launch, linear_launch
from tetris.errors import UnsupportedError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, LinearConfig, LinearProblem
from tetris.kernels.conv2d_paths import conv2d_launcher
from tetris.kernels.linear_paths import decode_config, linear_launcher, medium_config
from tetris.layers import BlockSparseConv2d, BlockSparseLinear
from tetris.layout import BlockLayout

CONV = Conv2dProblem(32, 256, 256, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), (64, 64), "float16", 8)
LINEAR = LinearProblem(8192, 4096, 4096, (64, 64), "float16", 1106)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is an H200."""
    for module in (dispatch, ops, stem):
        monkeypatch.setattr(module, "device_info", lambda device: H200)


def lists(shape: tuple[int, int], kept: float = 0.5, block: tuple[int, int] = (64, 64)):
    layout = random_layout(shape, block, kept).without_empty_rows()
    return layout.indptr, layout.indices


def test_a_hopper_convolution_gets_its_schedule(h200):
    launch = conv2d_launch(CONV, *lists((256, 256)))
    config = Conv2dConfig.from_key(launch.config)
    assert config.kernel == "hopper"
    from tetris.kernels.hopper.schedule import Schedule

    schedule = Schedule.from_tensors(launch.schedule)
    assert 1 <= schedule.programs <= H200.sm_count
    assert int(schedule.program_ptr[-1]) == len(schedule.order) > 0


def test_a_hopper_convolution_permutes_whole_groups_of_outputs(h200):
    layout = lists((256, 256))
    assert not conv2d_launch(CONV, *layout).permutes_output
    for group, permutes in ((64, True), (16, True), (8, False), (1, False)):  # sixteen float16 are a sector
        launch = conv2d_launch(CONV, *layout, output_group=group)
        assert launch.permutes_output == permutes
        assert Conv2dConfig.from_key(launch.config).output_group == (group if permutes else 0)
    portable = Conv2dConfig().to_key()
    assert not conv2d_launch(CONV, *layout, output_group=64, key=portable).permutes_output


def test_a_schedule_with_a_copy_of_the_values_is_made_again_when_they_change(h200):
    from tetris.kernels.hopper.schedule import Schedule

    layout = random_layout((128, 128), (64, 64), 0.5).without_empty_rows()
    steps = Conv2dConfig(kernel="hopper", tile_n=16, tile_h=4, tile_w=4, tile_k=32)
    layer = BlockSparseConv2d(
        128, 128, (3, 3), (64, 64), layout.n_blocks, (1, 1), (1, 1), (1, 1),
        values=torch.randn(layout.n_blocks, 9, 64, 64, dtype=torch.float16), layout=layout, config=steps.to_key(),
    )  # fmt: skip
    x = torch.zeros(32, 128, 28, 28, dtype=torch.float16)
    first = layer.launch(x)
    assert Schedule.from_tensors(first.schedule).weights is not None and layer.launch(x) is first
    with torch.no_grad():
        layer.values.mul_(2)
    assert torch.equal(layer.launch(x).schedule[-1], 2 * first.schedule[-1])
    layer.values.requires_grad_()
    in_training = Schedule.from_tensors(layer.launch(x).schedule)
    assert in_training.weights is None, "every launch reads the values themselves"


def test_a_given_key_is_taken_as_it_is(h200):
    key = Conv2dConfig(tile_h=8, tile_w=8).to_key()
    assert conv2d_launch(CONV, *lists((256, 256)), key=key) == Launch(key, [])
    key = LinearConfig(tile_tokens=32).to_key()
    assert linear_launch(LINEAR, *lists((4096, 4096)), key=key) == Launch(key, [])


def test_linear_layers_get_the_kernel_of_their_tokens_and_layout(h200):
    launch = linear_launch(LINEAR, *lists((4096, 4096), 0.27))
    assert LinearConfig.from_key(launch.config).kernel == "hopper" and len(launch.schedule) == 3
    small = replace(LINEAR, block=(32, 32), n_blocks=4424)
    scattered = linear_launch(small, *lists((4096, 4096), 0.27, (32, 32)))
    assert LinearConfig.from_key(scattered.config).kernel == "narrow" and len(scattered.schedule) == 4
    few = linear_launch(replace(LINEAR, tokens=1), *lists((4096, 4096), 0.27))
    assert LinearConfig.from_key(few.config).kernel == "vector" and len(few.schedule) == 2
    wide = replace(LINEAR, in_features=25088, n_blocks=1004)
    scattered = linear_launch(wide, *lists((4096, 25088), 0.04))  # its strips share hardly any inputs
    assert LinearConfig.from_key(scattered.config).kernel == "portable" and scattered.schedule == []


def test_a_long_row_overrules_a_choice_that_was_tuned_on_another_layout(h200, monkeypatch: pytest.MonkeyPatch):
    few = LinearProblem(8, 8192, 1024, (64, 64), "float16", 143, "int8")
    tuned = decode_config(few, H200)
    monkeypatch.setattr(dispatch, "shipped_linear_choice", lambda problem, device: tuned)
    mask = torch.zeros(16, 128, dtype=torch.bool)
    mask[:, 0] = mask[0] = True
    layout = BlockLayout.from_mask(mask, (1024, 8192), (64, 64))
    launch = linear_launch(few, layout.indptr, layout.indices)
    assert LinearConfig.from_key(launch.config).kernel == "split" and len(launch.schedule) == 2
    even = random_layout((1024, 8192), (64, 64), 0.07).without_empty_rows()
    assert linear_launch(few, even.indptr, even.indices) == Launch(tuned.to_key(), [])
    assert linear_launch(few, layout.indptr, layout.indices, key=tuned.to_key()) == Launch(tuned.to_key(), [])


def test_older_gpus_run_the_portable_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "device_info", lambda device: A100)
    launches = [conv2d_launch(CONV, *lists((256, 256))), linear_launch(LINEAR, *lists((4096, 4096)))]
    assert Conv2dConfig.from_key(launches[0].config).kernel == "portable"
    assert LinearConfig.from_key(launches[1].config).kernel == "portable"


def test_facts_come_from_the_driver(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton")

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA A100", 8, 0, 108

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    info = dispatch.device_info.__wrapped__(torch.device("cuda", 0))
    assert (info.name, info.capability, info.sm_count) == ("NVIDIA A100", (8, 0), 108)
    assert info.triton_version == triton.__version__ and info.backend == "cuda"


def test_a_gpu_without_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match="wanted Triton for cuda:7"):
        dispatch.device_info.__wrapped__(torch.device("cuda", 7))


def test_launchers_are_found_by_the_name_in_the_config():
    pytest.importorskip("triton")
    assert conv2d_launcher("hopper").__module__.endswith("hopper.conv2d")
    assert conv2d_launcher("portable").__module__ == "tetris.kernels.conv2d"
    assert linear_launcher("hopper").__module__.endswith("hopper.linear")
    assert linear_launcher("decode").__module__.endswith("linear_decode")
    assert linear_launcher("vector").__module__.endswith("linear_vector")
    assert linear_launcher("portable").__module__ == "tetris.kernels.linear"


def test_decode_and_medium_configs_fit_shared_memory():
    few = decode_config(replace(LINEAR, tokens=16), H200)
    assert (few.tile_out + 16) * few.tile_k * 2 * few.num_stages <= H200.shared_bytes and few.num_stages > 1
    medium = medium_config(replace(LINEAR, tokens=128), H200)
    assert medium.tile_tokens <= 64
    assert (medium.tile_tokens + medium.tile_out) * medium.tile_k * 2 * medium.num_stages <= H200.shared_bytes
    assert medium_config(replace(LINEAR, tokens=128), A100).num_stages < medium.num_stages


def sparse_linear(**options) -> BlockSparseLinear:
    layout = random_layout((64, 96), (16, 16), 0.5, seed=1).without_empty_rows()
    torch.manual_seed(0)
    values = torch.randn(layout.n_blocks, 16, 16)
    return BlockSparseLinear(96, 64, (16, 16), layout.n_blocks, values=values, layout=layout, **options)


def test_a_layer_makes_one_launch_for_each_kind_of_input(h200, monkeypatch: pytest.MonkeyPatch):
    layer, made = sparse_linear(), []
    make = layer._make_launch
    monkeypatch.setattr(layer, "_make_launch", lambda x: made.append(x.shape) or make(x))
    x = torch.zeros(300, 96)
    first = layer.launch(x)
    assert layer.launch(x + 1) is first and layer.launch(torch.zeros(300, 96).half()) is not first
    assert layer.launch(torch.zeros(1, 96)).config != first.config
    assert made == [(300, 96), (300, 96), (1, 96)]
    layer.load_state_dict(layer.state_dict())
    assert layer._launches == {}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.launch(x) == Launch() and len(made) == 3  # a new shape meets the portable default


def test_tf32_modes_matter_for_float32_only(h200, monkeypatch: pytest.MonkeyPatch):
    layer, x = sparse_linear(), torch.zeros(300, 96)
    half, full = layer.launch(x.half()), layer.launch(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # finds what was made, makes nothing
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        assert layer.launch(x.half()) is half and half != Launch()
        assert layer.launch(x) == Launch() != full
    assert layer.launch(x) is full


def test_another_config_forgets_launches_and_recorded_calls(h200, monkeypatch: pytest.MonkeyPatch):
    layer, forgotten = sparse_linear(), []
    monkeypatch.setattr(layer._calls, "clear", lambda: forgotten.append("calls"))
    first = layer.launch(torch.zeros(300, 96).half())
    key = LinearConfig(kernel="portable").to_key()
    layer.use_config(key)
    assert layer.config == key and layer._launches == {} and forgotten == ["calls"]
    assert layer.launch(torch.zeros(300, 96).half()).config == key != first.config


def test_a_convolution_plans_its_launch_for_the_pool_and_precision(h200, monkeypatch: pytest.MonkeyPatch):
    layout = random_layout((128, 64), (64, 32), 0.5).without_empty_rows()
    values = torch.randn(layout.n_blocks, 9, 64, 32)
    seen = {}

    def launch(problem, indptr, indices, **options):
        seen.update(options, problem=problem)
        return Launch("{}")

    monkeypatch.setattr("tetris.layers.conv2d_launch", launch)
    layer = BlockSparseConv2d(
        64, 128, (3, 3), (64, 32), layout.n_blocks, (1, 1), (1, 1), (1, 1), max_pool=True, values=values, layout=layout
    )
    layer.launch(torch.zeros(2, 64, 8, 8))
    assert seen["max_pool"] and seen["allow_tf32"] == torch.backends.cudnn.allow_tf32 and seen["key"] == ""
    assert seen["problem"] == Conv2dProblem(
        2, 64, 128, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (64, 32), "float32", layout.n_blocks
    )


class Elsewhere(torch.Tensor):
    """A CPU tensor whose device says "cuda"; detours by device type are taken, operations stay on the CPU."""

    @property
    def device(self):  # type: ignore[override]
        return torch.device("cuda")


def test_permutations_run_as_steps_of_their_own_on_a_gpu(h200):
    """Between explicit permutations, the layer on a GPU computes what the CPU's fused one does."""
    p_in, p_out = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (96, 64))
    layer = sparse_linear(input_permutation=p_in, output_permutation=p_out, activation="relu")
    layer.bias.data.normal_()
    x, residual = torch.randn(5, 96), torch.randn(5, 64)
    expected = layer._run(x, residual, -1)
    called = []

    def call(x, residual, permutations, launch):
        called.append((permutations, launch.config != ""))
        return ops.block_sparse_linear(
            x, layer.blocks, layer.indptr, layer.indices, layer.bias, residual, None, None, [], 64, "relu", False, "",
            None,
        )  # fmt: skip

    layer._call = call  # type: ignore[method-assign]
    got = layer._run(x.as_subclass(Elsewhere), residual, -1)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)
    assert called == [((None, None), True)]
    plain = sparse_linear(activation="relu")
    plain._call = call  # type: ignore[method-assign]
    assert plain._run(x.as_subclass(Elsewhere), None, -1).shape == (5, 64) and len(called) == 2


def test_a_permutation_of_groups_is_left_to_the_kernel_that_stores_it(h200):
    order = torch.arange(64).view(4, 16)[[2, 0, 3, 1]].reshape(-1)
    layer = sparse_linear(output_permutation=order)
    layer._make_launch = lambda x: Launch("{}", [], permutes_output=True)  # type: ignore[method-assign]
    called = []
    layer._call = lambda x, residual, permutations, launch: called.append(permutations) or x[:, :64]  # type: ignore
    x = torch.randn(5, 96).as_subclass(Elsewhere)
    layer._run(x, None, -1)
    layer._run(x, torch.randn(5, 64).as_subclass(Elsewhere), -1)
    assert [p_out is None for _, p_out in called] == [False, True]  # with a residual, steps of their own


@pytest.mark.parametrize("pools", [True, False], ids=["in the kernel", "behind it"])
def test_pooling_that_the_kernel_does_not_do_is_an_operation_of_its_own(pools, monkeypatch):
    """So that the launches of the convolution, which torch's pooling is not, are repeated."""
    layout = random_layout((32, 16), (16, 16), 1.0)
    values = torch.randn(2, 9, 16, 16)
    layer = tetris.BlockSparseConv2d(
        16, 32, (3, 3), (16, 16), 2, padding=(1, 1), max_pool=True, values=values, layout=layout
    )
    x, asked = torch.randn(1, 16, 6, 6), []
    expected = layer(x)
    layer._make_launch = lambda x: Launch("", pools=pools)  # type: ignore[method-assign]
    whole = ops.block_sparse_conv2d
    monkeypatch.setattr(ops, "block_sparse_conv2d", lambda *given: asked.append(given[-3]) or whole(*given))
    torch.testing.assert_close(layer._run(x.as_subclass(Elsewhere), None, 1).as_subclass(torch.Tensor), expected)
    assert asked == [pools]


@pytest.mark.usefixtures("triton_kernels")
def test_the_gpu_operators_launch_the_kernels_of_their_configs(h200, device):
    """The bodies that torch calls for CUDA tensors, here on the interpreter's operands."""
    layer = sparse_linear().to(device)
    x = torch.randn(20, 96, device=device)
    operands = (layer.values.view(-1, 16, 16), layer.indptr, layer.indices, None)
    run = ops.run_linear
    got = run(x, *operands, None, None, None, [], 64, "relu", False, "", None)
    expected = reference.block_sparse_linear(x, *operands, out_features=64, activation="relu")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    layout = random_layout((32, 16), (16, 16), 1.0)
    values = torch.randn(2, 9, 16, 16, device=device)
    image = torch.randn(1, 16, 6, 6, device=device)
    indptr, indices = layout.indptr.to(device), layout.indices.to(device)
    pooled = ops.run_conv2d(
        image, values, indptr, indices, None, None, None, None, [], 32, [3, 3], [1, 1], [1, 1], [1, 1], "none", True,
        False, "",
    )  # fmt: skip
    exact = reference.block_sparse_conv2d(image, values, indptr, indices, c_out=32, kernel_size=(3, 3), padding=(1, 1))
    torch.testing.assert_close(pooled.double(), torch.nn.functional.max_pool2d(exact, 2), rtol=1e-4, atol=1e-4)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(ops.run_permutation(x, order, 1), x[:, order])


@pytest.mark.usefixtures("triton_kernels")
def test_the_stem_operator_launches_its_kernel(h200, device):
    weight, x = torch.randn(16, 3, 3, 3, device=device), torch.randn(1, 3, 8, 8, device=device)
    packed = stem.pack_stem(weight)
    got = stem.run_stem(x, packed, None, [3, 3], [2, 2], [1, 1], [1, 1], "relu", False, False)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, 2, 1).relu()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_converted_model_knows_its_launches_are_not_part_of_it():
    layer = sparse_linear()
    layer._launches[("key",)] = Launch("{}")
    assert copy.deepcopy(layer)._launches == {} and len(layer._launches) == 1
    assert isinstance(layer, tetris.BlockSparseLinear)


def test_a_layer_prints_what_it_does():
    order = torch.arange(96).flip(0)
    text = repr(sparse_linear(input_permutation=order, activation="gelu", bias=False, kept_fraction=0.5))
    assert text == "BlockSparseLinear(96, 64, block=16x16, kept=0.500, activation=gelu, permutes input, bias=False)"
    assert sparse_linear(input_permutation=torch.arange(96)).input_permutation is None  # the identity costs nothing
