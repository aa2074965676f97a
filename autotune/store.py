"""The store of tuned choices: one JSON file under the user's cache folder, above the read-only tables of the package.

Entries are keyed by device, Triton version and problem. A lookup answers with the exact entry or the nearest one that
is near enough; a caller that gets None uses the analytic default. Writers lock the file, merge and replace it whole,
so that processes may tune side by side and a killed one loses nothing but its unfinished problem.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tetris.errors import FileFormatError
from tetris.files import write_text
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem

FORMAT = "tetris-tuning"
VERSION = 1
FILE_NAME = "tuning.json"
CACHE_VARIABLE = "TETRIS_CACHE_DIR"
LOCK_SECONDS = 60.0
TABLES = Path(__file__).resolve().parent / "tables"

Problem = Conv2dProblem | LinearProblem
Config = Conv2dConfig | LinearConfig

FAR = 2.0
"""Largest distance (see :func:`distance`) at which a neighbour's configuration is taken instead of the default."""


@dataclass(frozen=True)
class Entry:
    """One tuned choice: the best of ``tried`` configurations and what the analytic default took in the same run.

    ``max_pool``: measured with the 2x2 max-pool that follows the convolution.
    """

    device: str
    capability: tuple[int, int]
    triton: str
    problem: Problem
    config: Config
    time_us: float
    default_us: float = math.nan
    tried: int = 0
    max_pool: bool = False

    @property
    def key(self) -> str:
        """Identity in the store."""
        return "|".join([self.device, self.triton, problem_key(self.problem, self.max_pool)])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        op = "conv2d" if isinstance(self.problem, Conv2dProblem) else "linear"
        numbers = {"time_us": round(self.time_us, 3), "tried": self.tried}
        if not math.isnan(self.default_us):
            numbers["default_us"] = round(self.default_us, 3)
        where: dict[str, Any] = {
            "op": op,
            "device": self.device,
            "capability": list(self.capability),
            "triton": self.triton,
        }
        where |= {"max_pool": True} if self.max_pool else {}
        return where | {"problem": asdict(self.problem), "config": asdict(self.config)} | numbers

    @staticmethod
    def from_json(data: Any, source: str) -> Entry:
        """From what :meth:`to_json` gave. Raises FileFormatError, named by ``source``."""
        try:
            kinds = {"conv2d": (Conv2dProblem, Conv2dConfig), "linear": (LinearProblem, LinearConfig)}
            problem_type, config_type = kinds[data["op"]]
            return Entry(
                str(data["device"]),
                (int(data["capability"][0]), int(data["capability"][1])),
                str(data["triton"]),
                _build(problem_type, data["problem"]),
                _build(config_type, data["config"]),
                float(data["time_us"]),
                float(data.get("default_us", math.nan)),
                int(data.get("tried", 0)),
                bool(data.get("max_pool", False)),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{source}: wanted a tuned choice; got {data!r} ({error!r})") from error


def _build(kind: Any, data: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if set(data) - known:
        raise KeyError(f"{kind.__name__} has no {sorted(set(data) - known)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def problem_key(problem: Problem, max_pool: bool = False) -> str:
    """A problem as one text: the same for equal problems only."""
    return (
        f"{type(problem).__name__}{json.dumps(asdict(problem), separators=(',', ':'))}{' pooled' if max_pool else ''}"
    )


@dataclass(frozen=True)
class Match:
    """What a lookup found; ``distance`` 0 is the very problem on the very device and version."""

    entry: Entry
    distance: float

    @property
    def config(self) -> Config:
        return self.entry.config


def distance(entry: Entry, problem: Problem, device: DeviceInfo, max_pool: bool = False) -> float:
    """How far an entry's problem and machine are from the wanted ones; infinite where a choice cannot carry over.

    Sizes count by the binary logarithm of their ratio: twice the channels is 1 away. The image's size counts half as
    much again, because pixel tiles are cut for it. Another version of Triton or another GPU of the same
    architecture is .5 away each.
    """
    mine = entry.problem
    if type(mine) is not type(problem) or entry.capability != device.capability or entry.max_pool != max_pool:
        return math.inf
    if mine.dtype != problem.dtype or mine.block != problem.block:
        return math.inf
    other = 0.5 * (entry.device != device.name) + 0.5 * (entry.triton != device.triton_version)
    sizes = [(mine.n_blocks, problem.n_blocks, 0.25)]
    if isinstance(mine, Conv2dProblem) and isinstance(problem, Conv2dProblem):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            if getattr(mine, name) != getattr(problem, name):
                return math.inf
        sizes += [(mine.batch, problem.batch, 1.0), (mine.c_in, problem.c_in, 0.5), (mine.c_out, problem.c_out, 1.0)]
        sizes += [(mine.height, problem.height, 0.75), (mine.width, problem.width, 0.75)]
    elif isinstance(mine, LinearProblem) and isinstance(problem, LinearProblem):
        sizes += [(mine.tokens, problem.tokens, 1.0), (mine.in_features, problem.in_features, 0.5)]
        sizes += [(mine.out_features, problem.out_features, 1.0)]
    return other + sum(weight * abs(math.log2(max(a, 1) / max(b, 1))) for a, b, weight in sizes)


def cache_folder() -> Path:
    """``$TETRIS_CACHE_DIR``, or the platform's cache folder for this project."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    from platformdirs import user_cache_dir  # only where the store is opened without a folder

    return Path(user_cache_dir("tetris-sparse", appauthor=False))


def read_entries(path: Path) -> list[Entry]:
    """Every entry of a file. Raises FileFormatError if it is missing, corrupt or of another version."""
    if not path.is_file():
        raise FileFormatError(f"tuning: wanted a store of tuned choices at {path}; there is no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(
            f"tuning: {path} is corrupt ({error}); delete it and tune again, or import a saved one over it"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise FileFormatError(
            f'tuning: wanted {path} to be "{FORMAT}" version {VERSION}; got another kind of file; delete it or move it'
        )
    return [Entry.from_json(item, f"tuning: {path}, entry {i}") for i, item in enumerate(data.get("entries", []))]


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the file whole; one entry a line, sorted, so that versions of it compare well."""
    lines = [json.dumps(entry.to_json(), separators=(",", ":")) for entry in sorted(entries, key=lambda e: e.key)]
    body = ",\n".join(lines)
    write_text(path, f'{{"format":"{FORMAT}","version":{VERSION},"entries":[\n{body}\n]}}\n')


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
        folder = TABLES if self.tables is None else Path(self.tables)
        return {entry.key: entry for path in sorted(folder.glob("*.json")) for entry in read_entries(path)}

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
        entries = self.entries()
        found = min(entries, key=lambda entry: distance(entry, problem, device, max_pool), default=None)
        if found is None or (gap := distance(found, problem, device, max_pool)) > farthest:
            return None
        return Match(found, gap)

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
