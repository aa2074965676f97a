"""Tuned choices: which configuration was fastest for a problem on a device, and which choice serves a similar problem.

The package ships tables of them (``autotune/tables``), which :mod:`tetris.dispatch` asks when a layer meets a shape for
the first time; a user's own are kept by :mod:`tetris.autotune.store`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from tetris.errors import FileFormatError
from tetris.files import write_text
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem

FORMAT = "tetris-tuning"
VERSION = 1
TABLES = Path(__file__).resolve().parent / "autotune" / "tables"

Problem = Conv2dProblem | LinearProblem
Config = Conv2dConfig | LinearConfig

FAR = 1.0
"""Largest distance (see :func:`distance`) at which a neighbour's configuration is taken instead of the default."""
NEAR = 0.5
"""The same for the package's choices: nobody has timed them on the machine that runs them."""
OTHER_MACHINE = 0.25
"""Distance of another GPU of the same architecture, of another version of Triton, of the other 16-bit dtype."""


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

    Sizes count by the binary logarithm of their ratio: twice the outputs or the batch is 1 away, twice as high and wide
    an image 1.5, because pixel tiles are cut for it. For other machines and dtypes see :data:`OTHER_MACHINE`.
    """
    mine = entry.problem
    if type(mine) is not type(problem) or entry.capability != device.capability or entry.max_pool != max_pool:
        return math.inf
    halves = {mine.dtype, problem.dtype} <= {"float16", "bfloat16"}
    if mine.block != problem.block or (mine.dtype != problem.dtype and not halves):
        return math.inf
    others = (entry.device != device.name) + (entry.triton != device.triton_version) + (mine.dtype != problem.dtype)
    sizes = [(mine.n_blocks, problem.n_blocks, 0.25)]
    if isinstance(mine, Conv2dProblem) and isinstance(problem, Conv2dProblem):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            if getattr(mine, name) != getattr(problem, name):
                return math.inf
        sizes += [(mine.batch, problem.batch, 1.0), (mine.c_in, problem.c_in, 0.5), (mine.c_out, problem.c_out, 1.0)]
        sizes += [(mine.height, problem.height, 0.75), (mine.width, problem.width, 0.75)]
    elif isinstance(mine, LinearProblem) and isinstance(problem, LinearProblem):
        if mine.weight_dtype != problem.weight_dtype:
            return math.inf
        sizes += [(mine.tokens, problem.tokens, 1.0), (mine.in_features, problem.in_features, 0.5)]
        sizes += [(mine.out_features, problem.out_features, 1.0)]
    return OTHER_MACHINE * others + sum(weight * abs(math.log2(max(a, 1) / max(b, 1))) for a, b, weight in sizes)


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


def nearest(
    entries: Iterable[Entry], problem: Problem, device: DeviceInfo, max_pool: bool = False, farthest: float = FAR
) -> Match | None:
    """The exact or the nearest entry within ``farthest``; None if there is none: use the analytic default."""
    found = min(
        (Match(entry, distance(entry, problem, device, max_pool)) for entry in entries),
        key=lambda match: match.distance,
        default=None,
    )
    return found if found is not None and found.distance <= farthest else None


@lru_cache(maxsize=8)
def table_entries(folder: Path = TABLES) -> tuple[Entry, ...]:
    """All entries of a folder of tables, read once."""
    return tuple(entry for path in sorted(folder.glob("*.json")) for entry in read_entries(path))


@lru_cache(maxsize=4096)
def shipped_choice(problem: Problem, device: DeviceInfo, max_pool: bool = False) -> Match | None:
    """The package's choice for a problem that nobody tuned; None where it has none near enough.

    Cost: a look through some hundred entries at the first call for a problem.
    """
    return nearest(table_entries(), problem, device, max_pool, NEAR)


def shipped_conv2d_choice(problem: Conv2dProblem, device: DeviceInfo, max_pool: bool = False) -> Conv2dConfig | None:
    """The config of :func:`shipped_choice`."""
    match = shipped_choice(problem, device, max_pool)
    return match.config if match and isinstance(match.config, Conv2dConfig) else None


def shipped_linear_choice(problem: LinearProblem, device: DeviceInfo) -> LinearConfig | None:
    """The config of :func:`shipped_choice`."""
    match = shipped_choice(problem, device)
    return match.config if match and isinstance(match.config, LinearConfig) else None
