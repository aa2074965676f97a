"""A small training loop: the dense network and, with masks in place, fine-tuning. Interrupted runs resume.

Everything random derives from (seed, epoch), so a run that was cut and resumed sees the same batches as one that was
not. Masks are part of the model (parametrizations): fine-tuning is training the masked copy.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tetris.demo.datasets import Dataset
from tetris.errors import FileFormatError, TetrisError
from tetris.files import atomic_file

OnStep = Callable[[int, int], None]
"""Called after every step with (steps done, steps in all)."""


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum; the learning rate falls along a half cosine from ``learning_rate`` to 0."""

    epochs: int
    learning_rate: float
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def rate_at(self, progress: float) -> float:
        """The learning rate after ``progress`` (0 to 1) of all steps."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``factory()`` with torch's generator seeded for it alone: the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return factory()


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Let torch use a single CPU thread meanwhile.

    A step of LeNet is dozens of operations of a fraction of a millisecond; where other work shares the cores, threads
    wait for each other at every one. Fine-tuning for two epochs on two loaded cores: 28 s with two threads, 3.5 s with
    one; on idle cores one thread costs less than half as much again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 1024) -> float:
    """Fraction of ``images`` [N, 1, 28, 28] that the model, in evaluation mode, assigns to their label."""
    model.eval()
    right = 0
    for batch, wanted in zip(images.split(batch_size), labels.split(batch_size)):
        right += int((model(batch).argmax(1) == wanted).sum())
    return right / len(labels)


def train(
    model: nn.Module,
    data: Dataset,
    schedule: Schedule,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Train ``model`` in place on ``data`` (same device) and return it in evaluation mode.

    Args:
        checkpoint: written after every epoch, atomically; if it exists, training goes on from it; the caller removes
            it.
    Raises:
        FileFormatError: the checkpoint is corrupt or of another model or schedule.
        TetrisError: the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), schedule.learning_rate, schedule.momentum, weight_decay=schedule.weight_decay
    )
    first = _resume(checkpoint, model, optimizer, schedule, seed) if checkpoint is not None else 0
    n_images = len(data.train_labels)
    steps_per_epoch = -(-n_images // schedule.batch_size)
    n_steps = steps_per_epoch * schedule.epochs
    step = first * steps_per_epoch
    if on_step is not None:
        on_step(step, n_steps)
    model.train()
    for epoch in range(first, schedule.epochs):
        order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for indices in order.to(data.train_labels.device).split(schedule.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step / n_steps)
            loss = F.cross_entropy(model(data.train_images[indices]), data.train_labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if on_step is not None:
                on_step(step, n_steps)
        if not torch.isfinite(loss):
            raise TetrisError(
                f"training: the loss became {loss.item()} in epoch {epoch + 1} "
                f"at learning rate {schedule.learning_rate}; choose a smaller one"
            )
        if checkpoint is not None:
            _save(checkpoint, model, optimizer, schedule, seed, epoch + 1)
    return model.eval()


def _fingerprint(model: nn.Module, schedule: Schedule, seed: int) -> str:
    """What must agree between a checkpoint and the run that goes on from it."""
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return f"{schedule} seed={seed} {shapes}"


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, seed: int, epochs_done: int
) -> None:
    state = {
        "fingerprint": _fingerprint(model, schedule, seed),
        "epochs_done": epochs_done,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, seed: int) -> int:
    """Load ``path`` if it exists; the number of epochs that are done."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fingerprint = state["fingerprint"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise FileFormatError(
            f"training: the checkpoint {path} is corrupt ({error}); delete it to start over"
        ) from error
    if fingerprint != _fingerprint(model, schedule, seed):
        raise FileFormatError(
            f"training: the checkpoint {path} is of another model, schedule or seed; delete it to start over"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs_done"])
