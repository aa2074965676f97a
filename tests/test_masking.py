"""``tetris.prune``: masked copies that stay masked while training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tetris
from tests.support.fake_gpu import on_gpu
from tetris import layer_searches
from tetris.errors import TetrisError
from tetris.models import MLP, LeNet
from tetris.plans import LayerPlan, ModelPlan

X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def lenet() -> LeNet:
    torch.manual_seed(0)
    return LeNet()


def test_the_model_is_not_changed_and_the_copy_is_masked():
    model = lenet()
    before = copy.deepcopy(model.state_dict())
    pruned = tetris.prune(model, 0.7, block=(16, 8), example_inputs=X, steps=5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(tetris.masked_layers(pruned)) == {"conv2", "fc1"}
    weight = pruned.conv2.weight
    mask = tetris.reorderings(pruned)["conv2"].keep_mask
    assert torch.equal(weight, torch.where(mask, model.conv2.weight, 0))
    assert float((pruned.fc1.weight != 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_reorderings_read_back_what_the_search_found():
    model = lenet()
    r = tetris.reorder(model.conv2.weight, (16, 8), 0.7)
    pruned = tetris.prune(model, {"conv2": 0.7}, block=(16, 8), method="paper", permutations="separate")
    back = tetris.reorderings(pruned)["conv2"]
    assert torch.equal(back.block_mask, r.block_mask) and torch.equal(back.keep_mask, r.keep_mask)
    assert all(torch.equal(back.permutations[d], r.permutations[d]) for d in (0, 1))
    assert back.retained == pytest.approx(r.retained)
    assert "16x8, sparsity=0.700" in repr(pruned.conv2)


def test_training_moves_kept_weights_only():
    pruned = tetris.prune(lenet(), 0.7, block=(16, 8), method="sort", example_inputs=X)
    mask = tetris.masked_layers(pruned)["fc1"].mask
    before = pruned.fc1.weight.detach().clone()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pruned(X), torch.arange(4)).backward()
        optimizer.step()
    after = pruned.fc1.weight.detach()
    assert (after[~mask] == 0).all() and (after[mask] != before[mask]).float().mean() > 0.5


def test_state_dicts_carry_masks_and_permutations():
    a = tetris.prune(lenet(), 0.7, block=(16, 8), method="paper", example_inputs=X)
    b = tetris.prune(LeNet(), 0.7, block=(16, 8), method="none", example_inputs=X)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(X), b(X))
    fast = tetris.convert(b, example_inputs=X)
    assert tetris.verify(a, fast, example_inputs=X).passed


def test_masks_can_be_baked_without_touching_copies():
    pruned = tetris.prune(lenet(), 0.7, block=(16, 8), method="sort")
    y, baked = pruned(X), tetris.bake_masks(copy.deepcopy(pruned))
    assert torch.equal(baked(X), y) and not tetris.masked_layers(baked) and type(baked.fc1) is nn.Linear
    assert torch.equal(pruned(X), y) and baked.fc1.weight.requires_grad


@pytest.mark.parametrize("permutations", ["shared", "separate"])
@pytest.mark.parametrize("method", ["none", "sort", "paper", "annealed"])
def test_reordering_retains_more_and_is_deterministic(method, permutations):
    options = {"block": (16, 8), "permutations": permutations, "example_inputs": X, "steps": 5, "seed": 3}
    first, second = (tetris.reorderings(tetris.prune(lenet(), 0.7, method=method, **options)) for _ in range(2))
    plain = tetris.reorderings(tetris.prune(lenet(), 0.7, method="none", block=(16, 8)))
    for name, r in first.items():
        assert torch.equal(r.keep_mask, second[name].keep_mask)
        weight = lenet().get_submodule(name).weight.detach().abs()
        kept = float(weight[r.keep_mask].sum() / weight.sum())
        assert r.retained == pytest.approx(kept, rel=1e-5)
    assert sum(r.retained for r in first.values()) >= sum(r.retained for r in plain.values()) - 1e-9


def test_shared_permutations_agree_between_neighbours():
    found = tetris.reorderings(
        tetris.prune(lenet(), 0.7, block=(10, 8), method="paper", permutations="shared", example_inputs=X)
    )
    outputs, inputs = found["conv2"].permutations[0], found["fc1"].permutations[1]
    assert torch.equal(inputs, tetris.permutation.expand(outputs, 16))


@pytest.mark.parametrize("structure", ["element", "filter", "channel", "row", "column", "2:4"])
def test_other_structures_mask_without_blocks(structure):
    pruned = tetris.prune(MLP(32, 64, 32), 0.5, block=8, structure=structure, method="none")
    assert all(m.block is None for m in tetris.masked_layers(pruned).values())
    assert float((pruned.fc1.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_a_plan_replaces_sparsity_and_block():
    plan = ModelPlan(
        (
            LayerPlan("conv2", "conv2d", (50, 20, 5, 5), (10, 5), 0.5),
            LayerPlan("fc1", "linear", (500, 800), None),
        )
    )
    pruned = tetris.prune(lenet(), plan=plan, method="sort")
    assert {n: m.block for n, m in tetris.masked_layers(pruned).items()} == {"conv2": (10, 5)}
    with pytest.raises(TetrisError, match="got both"):
        tetris.prune(lenet(), 0.5, plan=plan)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            LayerPlan("conv2", "conv2d", (64, 20, 5, 5), (10, 5), 0.5),
            r"\(64, 20, 5, 5\); the model has \(50, 20, 5, 5\)",
        ),
        (LayerPlan("conv7", "conv2d", (50, 20, 5, 5)), "layer conv7 .* the model has no such layer"),
    ],
)
def test_a_plan_of_another_model_is_refused(layer, words):
    with pytest.raises(TetrisError, match=words):
        tetris.prune(lenet(), plan=ModelPlan((layer,)))


def test_importance_by_layer_decides_what_stays():
    model = MLP(32, 64, 32)
    importance = torch.zeros(64, 32)
    importance[:16] = 1
    pruned = tetris.prune(model, {"fc1": 0.75}, block=(16, 32), method="none", importance={"fc1": importance})
    assert (pruned.fc1.weight[:16] != 0).all() and (pruned.fc1.weight[16:] == 0).all()


def test_progress_counts_layers():
    seen = []
    tetris.prune(lenet(), 0.7, method="sort", permutations="separate", progress=lambda *a: seen.append(a))
    assert [s[0] for s in seen] == ["conv2", "fc1", "fc1"] and seen[-1][1:] == (2, 2)


def test_a_search_shared_by_all_layers_tells_its_steps():
    seen = []
    tetris.prune(lenet(), 0.7, block=(16, 8), example_inputs=X, steps=3, progress=lambda *a: seen.append(a))
    assert seen[0] == ("all layers together", 0, 2) and seen[-1] == ("all layers together", 2, 2)
    assert ("all layers together, step 3", 0, 2) in seen


def test_layers_searched_side_by_side_are_those_searched_alone(monkeypatch: pytest.MonkeyPatch):
    options = {"sparsity": 0.7, "block": (16, 8), "permutations": "separate", "steps": 4}
    alone, seen = tetris.reorderings(tetris.prune(lenet(), **options)), []
    monkeypatch.setattr(layer_searches, "_batches", lambda requests: [requests])
    together = tetris.reorderings(tetris.prune(lenet(), progress=lambda *a: seen.append(a), **options))
    assert list(together) == list(alone) and (seen[0], seen[-1]) == (("conv2", 0, 2), ("fc1", 2, 2))
    assert [step[0] for step in seen[1:-1]][:4] == [f"conv2, step {step}" for step in (1, 2, 3, 4)]
    for name, r in together.items():
        assert torch.equal(r.keep_mask, alone[name].keep_mask) and torch.equal(r.block_mask, alone[name].block_mask)
        assert all(torch.equal(p, alone[name].permutations[dim]) for dim, p in r.permutations.items())


def test_layers_are_searched_together_on_one_gpu_only_and_within_bounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer_searches, "AT_ONCE", 100)

    def request(name: str, weight: torch.Tensor) -> layer_searches.Request:
        return layer_searches.Request(name, weight, "l1", (4, 4), 0.5)

    def batches(weight: torch.Tensor) -> list[str]:
        return [
            "".join(r.name for r in batch) for batch in layer_searches._batches([request(n, weight) for n in "abc"])
        ]

    assert batches(torch.ones(6, 8)) == ["a", "b", "c"] and batches(on_gpu(torch.ones(6, 8))) == ["ab", "c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "wanted a sparsity"),
        ({"sparsity": 1.5}, r"\[0, 1\)"),
        ({"sparsity": 0.5, "permutations": "best"}, "auto, shared, separate"),
        ({"sparsity": 0.5, "permutations": "shared"}, "wants example_inputs"),
        ({"sparsity": 0.5, "method": "magic"}, "wanted a method"),
        ({"sparsity": 0.5, "structure": "diagonal"}, "structure: wanted"),
        ({"sparsity": 0.5, "skip": ["fc7"]}, "skip: 'fc7' matches no"),
        ({"sparsity": 0.5, "seed": "1"}, "wanted an int as seed; got str '1'"),
        ({"sparsity": 0.5, "example_inputs": 3}, "example_inputs: wanted a tensor"),
        ({"sparsity": 0.5, "example_inputs": X[:, :, 1:]}, "wanted inputs that LeNet runs on"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(TetrisError, match=words):
        tetris.prune(lenet(), **options)


def test_nan_weights_are_refused_by_name():
    model = lenet()
    model.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(TetrisError, match="fc1: importance: wanted finite weights"):
        tetris.prune(model, 0.5)


def test_a_pruned_model_is_not_pruned_again():
    pruned = tetris.prune(lenet(), 0.5, method="sort")
    with pytest.raises(TetrisError, match="pruned already"):
        tetris.prune(pruned, 0.5)


def test_a_layer_with_a_parametrization_is_refused_before_it_is_fine_tuned():
    model = lenet()
    nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(TetrisError, match="fc1 has a parametrization of its own"):
        tetris.prune(model, 0.5, method="sort")
    assert set(tetris.masked_layers(tetris.prune(model, 0.5, method="sort", skip=["fc1"]))) == {"conv2"}


@pytest.mark.parametrize("model", ["net", nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TetrisError, match=r"wanted an nn\.Module; got"):
        tetris.prune(model, 0.5)


def test_a_bare_layer_is_refused_with_advice():
    with pytest.raises(TetrisError, match="a bare Linear; wrap it"):
        tetris.prune(nn.Linear(64, 64), 0.5)


class Attention(nn.Module):
    """An attention whose projections are read, not called, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.idle = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("permutations", ["auto", "separate"])
def test_attention_and_idle_layers_do_not_get_in_the_way(permutations):
    x = torch.randn(2, 5, 32)
    options = {"block": 8, "method": "sort", "permutations": permutations, "example_inputs": x}
    pruned = tetris.prune(Attention(), 0.5, **options)
    assert set(tetris.masked_layers(pruned)) == {"up", "down", "idle"}
    fast = tetris.convert(pruned, example_inputs=x)
    assert tetris.verify(pruned, fast, example_inputs=x).passed
