"""Outputs that appear whole or not at all: written beside their place under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tetris.errors import FileFormatError


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path`` when the block ends well and vanishes when it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _readable_by_others(temporary, 0o666)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory to fill; it becomes ``path`` when the block ends well and vanishes when it raises.

    Raises:
        FileFormatError: ``path`` exists, is not an empty directory, and ``overwrite`` is off; nothing is touched then.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise FileFormatError(f"{path}: exists already; choose another directory or ask to overwrite it (--force)")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _readable_by_others(temporary, 0o777)
        _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what stood there is set aside first and removed only when the new one stands."""
    if not target.exists():
        os.replace(source, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside / target.name)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(aside / target.name, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _readable_by_others(path: Path, mode: int) -> None:
    """Give a temporary (created private) the permissions that the user's umask gives new files."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)
