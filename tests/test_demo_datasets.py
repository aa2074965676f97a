"""The demo's data: the digits' fixed split, MNIST files as they come, and every way in which they can be broken."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from tetris.demo.datasets import IMAGE_MAGIC, LABEL_MAGIC, digits, load_dataset, mnist, read_idx
from tetris.errors import FileFormatError, TetrisError


def idx_bytes(array: np.ndarray) -> bytes:
    magic = IMAGE_MAGIC if array.ndim == 3 else LABEL_MAGIC
    return b"".join(size.to_bytes(4, "big") for size in (magic, *array.shape)) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """A folder with four small, valid files; images gzipped, labels under the dotted spelling."""
    random = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = random.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{prefix}-labels.idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 10))
    return tmp_path


def test_digits_are_real_upsampled_and_split_once() -> None:
    data, again = digits(), digits()
    assert data.train_images.shape == (1347, 1, 28, 28) and data.test_images.shape == (450, 1, 28, 28)
    assert torch.equal(data.test_images, again.test_images) and torch.equal(data.train_labels, again.train_labels)
    assert data.train_images.min() == 0 and data.train_images.max() <= 1
    assert data.test_labels.bincount().min() >= 43, "the split is stratified"
    seen = {image.numpy().tobytes() for image in data.train_images}
    leaked = sum(image.numpy().tobytes() in seen for image in data.test_images)
    assert leaked == 0, "no held-out image was trained on"


def test_mnist_reads_plain_and_gzipped_files(mnist_folder: Path) -> None:
    data = load_dataset("mnist", mnist_folder)
    assert data.train_images.shape == (12, 1, 28, 28) and data.test_images.shape == (5, 1, 28, 28)
    assert data.train_labels.tolist() == [i % 10 for i in range(12)]
    raw = read_idx(mnist_folder / "train-images-idx3-ubyte.gz", IMAGE_MAGIC)
    torch.testing.assert_close(data.train_images[:, 0] * 255, torch.tensor(raw).float())
    assert "12 training images, 5 held out" in data.describe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels.idx1-ubyte", idx_bytes(np.arange(12) % 10)[:-3], "promises 12 = 12 bytes; it holds 9"),
        ("train-labels.idx1-ubyte", b"<html>not found</html>", "should be an IDX file that starts with 2049"),
        ("train-labels.idx1-ubyte", b"\0\0", "found 2 bytes"),
        ("train-labels.idx1-ubyte", idx_bytes(np.arange(11) % 10), "12 images and .* 11 labels"),
        ("t10k-labels.idx1-ubyte", idx_bytes(np.arange(5) + 6), "should hold digits 0 to 9; found 10"),
        ("t10k-images-idx3-ubyte.gz", b"\x1f\x8b\x08broken", "cannot be read"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(bytes(4000))[:30], "cannot be read"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx_bytes(np.zeros((5, 14, 14)))), "28x28 images; got 14x14"),
    ],
)
def test_broken_mnist_files_are_named(mnist_folder: Path, name: str, content: bytes, message: str) -> None:
    (mnist_folder / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        mnist(mnist_folder)
    assert name in str(caught.value)


def test_missing_files_directories_and_names(mnist_folder: Path) -> None:
    (mnist_folder / "t10k-labels.idx1-ubyte").unlink()
    with pytest.raises(
        FileFormatError, match=r"lacks t10k-labels-idx1-ubyte \(also looked for t10k-labels-idx1-ubyte.gz"
    ):
        mnist(mnist_folder)
    with pytest.raises(FileFormatError, match="--data DIR"):
        mnist(mnist_folder / "nowhere")
    with pytest.raises(TetrisError, match="--data DIR"):
        load_dataset("mnist")
    with pytest.raises(TetrisError, match="'digits' or 'mnist'; got 'cifar'"):
        load_dataset("cifar")
