"""What the demo learns: scikit-learn's handwritten digits, or MNIST from files that the user has.

Nothing is downloaded. Both give 28x28 grey images in [0, 1] and a held-out test split that no seed changes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tetris.errors import FileFormatError, TetrisError

IMAGE_SIZE = 28
N_CLASSES = 10
IMAGE_MAGIC, LABEL_MAGIC = 2051, 2049
"""First four bytes (big endian) of an IDX file of unsigned bytes with three dimensions, and with one."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images [N, 1, 28, 28] in fp32, 0 to 1, and labels [N] in int64, of the training and the held-out split."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        fields = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in fields})

    def describe(self) -> str:
        """One line for the console and the report."""
        return f"{self.name}: {len(self.train_labels)} training images, {len(self.test_labels)} held out"


def digits() -> Dataset:
    """The UCI digits that ship with scikit-learn: 1797 real 8x8 scans, upsampled bilinearly; a quarter is held out.

    The split is stratified by class and fixed (its own seed), so results of different runs compare.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(np.arange(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    small = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    return Dataset("scikit-learn digits", images[train], labels[train], images[test], labels[test])


def mnist(directory: Path | str) -> Dataset:
    """MNIST from its four IDX files in ``directory``, plain or gzipped, under either of their usual spellings.

    Raises:
        FileFormatError: a file is missing, truncated, not an IDX file, or the images and labels do not match.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileFormatError(
            f"mnist: wanted a directory with the four MNIST files; {directory} is none; pass --data DIR"
        )
    train_images, train_labels = _split(directory, "train")
    test_images, test_labels = _split(directory, "t10k")
    return Dataset("MNIST", train_images, train_labels, test_images, test_labels)


def load_dataset(name: str, directory: Path | str | None = None) -> Dataset:
    """``"digits"``, or ``"mnist"`` with the directory of its files."""
    if name == "digits":
        return digits()
    if name != "mnist":
        raise TetrisError(f"dataset: wanted 'digits' or 'mnist'; got {name!r}")
    if directory is None:
        raise TetrisError(
            "dataset: mnist needs the directory of its four files; pass --data DIR (nothing is downloaded)"
        )
    return mnist(directory)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The unsigned bytes of an IDX file in their shape: [N, H, W] for images, [N] for labels.

    Args:
        path: the file; read through gzip where its name ends in ``.gz``.
        magic: IMAGE_MAGIC or LABEL_MAGIC.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(f"mnist: {path} cannot be read ({error}); download it again") from error
    n_dims = magic % 256
    header = 4 * (1 + n_dims)
    if len(data) < header or int.from_bytes(data[:4], "big") != magic:
        found = int.from_bytes(data[:4], "big") if len(data) >= 4 else f"{len(data)} bytes"
        raise FileFormatError(f"mnist: {path} should be an IDX file that starts with {magic}; found {found}")
    shape = tuple(int.from_bytes(data[4 * i + 4 : 4 * i + 8], "big") for i in range(n_dims))
    if len(data) - header != math.prod(shape):
        raise FileFormatError(
            f"mnist: {path} promises {'x'.join(map(str, shape))} = {math.prod(shape)} bytes; "
            f"it holds {len(data) - header}; it is truncated or corrupt, download it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _split(directory: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, 28, 28] and labels [N] of one split."""
    image_path, label_path = _find(directory, f"{prefix}-images", 3), _find(directory, f"{prefix}-labels", 1)
    images, labels = read_idx(image_path, IMAGE_MAGIC), read_idx(label_path, LABEL_MAGIC)
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise FileFormatError(f"mnist: {image_path} should hold 28x28 images; got {images.shape[1]}x{images.shape[2]}")
    if len(images) != len(labels) or not len(images):
        raise FileFormatError(
            f"mnist: {image_path.name} holds {len(images)} images and {label_path.name} {len(labels)} labels; "
            "they should match, and there should be some"
        )
    if labels.max() >= N_CLASSES:
        raise FileFormatError(f"mnist: {label_path} should hold digits 0 to 9; found {labels.max()}")
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None], torch.from_numpy(labels.astype(np.int64))


def _find(directory: Path, stem: str, n_dims: int) -> Path:
    """The first of the file's usual names that exists."""
    names = [f"{stem}{separator}idx{n_dims}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileFormatError(f"mnist: {directory} lacks {names[0]} (also looked for {', '.join(names[1:])})")
