"""Atomic outputs: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetris.errors import FileFormatError
from tetris.files import atomic_directory, atomic_file, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]
    write_text(target, "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o400


def test_a_failed_directory_vanishes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "model").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_directory(out, overwrite=content == "second") as temporary:
            (temporary / content).write_text(content)
        assert [path.name for path in out.iterdir()] == [content]
    with pytest.raises(FileFormatError, match="exists already"), atomic_directory(out):
        raise AssertionError("the block must not run")
    assert [path.name for path in out.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"
