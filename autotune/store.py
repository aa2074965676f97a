"""The store of tuned choices: one JSON file under the user's cache folder, above the read-only tables of the package.

Entries are keyed by device, Triton version and problem. A lookup answers with the exact entry or the nearest one that
is near enough; a caller that gets None uses the analytic default. Writers lock the file, merge and replace it whole,
so that processes may tune side by side and a killed one loses nothing but its unfinished problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tetris.kernels.configs import DeviceInfo
from tetris.tuned_choices import (
    FAR,
    TABLES,
    Entry,
    Match,
    Problem,
    nearest,
    read_entries,
    table_entries,
    write_entries,
)

FILE_NAME = "tuning.json"
CACHE_VARIABLE = "TETRIS_CACHE_DIR"
LOCK_SECONDS = 60.0


def cache_folder() -> Path:
    """``$TETRIS_CACHE_DIR``, or the platform's cache folder for this project."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    from platformdirs import user_cache_dir  # only where the store is opened without a folder

    return Path(user_cache_dir("tetris-sparse", appauthor=False))


@dataclass
class TuningStore:
    """Tuned choices of this user, above those shipped with the package.

    Attributes:
        folder: where ``tuning.json`` lies; None = :func:`cache_folder`.
        tables: folder of read-only tables below the user's file; None = the package's.
    """

    folder: Path | None = None
    tables: Path | None = None
    _cached: tuple[tuple[int, int, int], dict[str, Entry]] | None = field(default=None, init=False, repr=False)

    @cached_property
    def path(self) -> Path:
        """The user's file; it need not exist."""
        return (Path(self.folder) if self.folder is not None else cache_folder()) / FILE_NAME

    @cached_property
    def shipped(self) -> dict[str, Entry]:
        """The package's entries by key."""
        return {entry.key: entry for entry in table_entries(TABLES if self.tables is None else Path(self.tables))}

    @property
    def mine(self) -> dict[str, Entry]:
        """The user's entries by key; read again whenever another process replaced the file."""
        if not self.path.exists():
            return {}
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if self._cached is None or self._cached[0] != stamp:
            self._cached = stamp, {entry.key: entry for entry in read_entries(self.path)}
        return self._cached[1]

    def entries(self) -> list[Entry]:
        """All of them; the user's hide the package's of the same key."""
        return list((self.shipped | self.mine).values())

    def lookup(
        self, problem: Problem, device: DeviceInfo, farthest: float = FAR, max_pool: bool = False
    ) -> Match | None:
        """The exact or the nearest entry within ``farthest``; None if there is none: use the analytic default."""
        return nearest(self.entries(), problem, device, max_pool, farthest)

    def put(self, entries: Iterable[Entry], keep_faster: bool = False) -> int:
        """Merge entries into the user's file; returns how many were taken.

        Args:
            entries: replace those of the same key.
            keep_faster: of two entries of one key the faster stays.
        """
        from filelock import FileLock  # only writers lock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
            merged = dict(self.mine)
            taken = [e for e in entries if not (keep_faster and _faster(merged.get(e.key), e))]
            merged |= {entry.key: entry for entry in taken}
            write_entries(self.path, merged.values())
        return len(taken)

    def export(self, path: str | Path) -> int:
        """Write the user's entries to a file of their own, e.g. to ship them; returns how many."""
        write_entries(Path(path), self.mine.values())
        return len(self.mine)

    def import_from(self, path: str | Path) -> int:
        """Merge a file that :meth:`export` wrote; of two entries of one key the faster stays. Returns how many came."""
        return self.put(read_entries(Path(path)), keep_faster=True)


def _faster(old: Entry | None, new: Entry) -> bool:
    return old is not None and old.time_us <= new.time_us
