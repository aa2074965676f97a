"""The demo's training loop: it learns, is deterministic by seed, and a cut run ends as an uncut one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tetris.demo.datasets import Dataset
from tetris.demo.training import Schedule, accuracy, seeded, train
from tetris.errors import FileFormatError, TetrisError


class Interrupted(Exception):
    """Stands for a user's Ctrl-C."""


def small_data() -> Dataset:
    """Two easy classes of 28x28 images: the upper or the lower half is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 2
    images = 0.2 * torch.rand(96, 1, 28, 28, generator=generator)
    images[labels == 0, :, :14] += 0.6
    images[labels == 1, :, 14:] += 0.6
    return Dataset("halves", images[:64], labels[:64], images[64:], labels[64:])


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 2)), seed=3)


SCHEDULE = Schedule(epochs=4, learning_rate=0.05, batch_size=16)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_learns_and_repeats_by_seed() -> None:
    data = small_data()
    first, second = (train(network(), data, SCHEDULE, seed=1) for _ in range(2))
    assert accuracy(first, data.test_images, data.test_labels) == 1.0
    assert torch.equal(weights_of(first), weights_of(second))
    other = train(network(), data, SCHEDULE, seed=2)
    assert not torch.equal(weights_of(first), weights_of(other))
    assert not first.training


def test_seeded_leaves_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    network()
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    data, checkpoint = small_data(), tmp_path / "run.pt"
    steps: list[int] = []

    def cut(done: int, total: int) -> None:
        if done == 10:  # in the third epoch of four steps each
            raise Interrupted

    with pytest.raises(Interrupted):
        train(network(), data, SCHEDULE, seed=1, checkpoint=checkpoint, on_step=cut)
    resumed = train(network(), data, SCHEDULE, 1, checkpoint, on_step=lambda done, total: steps.append(done))
    assert steps == list(range(8, 17)), "two epochs were done already"
    assert torch.equal(weights_of(resumed), weights_of(train(network(), data, SCHEDULE, seed=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"], "no temporary files are left"


def test_a_checkpoint_of_another_run_or_a_corrupt_one_is_refused(tmp_path: Path) -> None:
    data, checkpoint = small_data(), tmp_path / "run.pt"
    train(network(), data, SCHEDULE, 1, checkpoint)
    with pytest.raises(FileFormatError, match="another model, schedule or seed"):
        train(network(), data, replace(SCHEDULE, learning_rate=0.01), 1, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"corrupt .* delete it"):
        train(network(), data, SCHEDULE, 1, checkpoint)


def test_a_diverging_loss_is_an_error() -> None:
    with pytest.raises(TetrisError, match="choose a smaller one"):
        train(network(), small_data(), replace(SCHEDULE, learning_rate=1e20))
