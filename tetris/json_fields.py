"""Reading dataclasses from JSON that people may have edited: every field checked, errors that name file and field.

``source`` says in every error where the value stands; all functions raise FileFormatError.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from tetris.errors import FileFormatError

_NUMBER = (int, float)


def known_fields(data: Any, kind: type, source: str, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of a JSON object that are fields of the dataclass ``kind``, type-checked; refuses unknown ones."""
    if not isinstance(data, dict):
        raise FileFormatError(f"{source}: wanted an object; got {data!r}")
    types = {f.name: str(f.type) for f in fields(kind)}
    unknown = set(data) - set(types) - set(ignore)
    if unknown:
        raise FileFormatError(f"{source}: unknown fields {sorted(unknown)}; it has {', '.join(types)}")
    found = {name: value for name, value in data.items() if name not in ignore}
    for name, value in found.items():
        wanted: tuple[type, ...] = {"str": (str,), "float": _NUMBER}.get(types[name], (object,))
        if not isinstance(value, wanted) or (wanted is _NUMBER and isinstance(value, bool)):
            raise FileFormatError(f"{source}: {name} wants a {types[name]}; got {value!r}")
    return found


def complete_fields(data: Any, kind: type, source: str) -> dict[str, Any]:
    """As :func:`known_fields`; the fields without a default must be there."""
    found = known_fields(data, kind, source)
    missing = {f.name for f in fields(kind) if f.default is MISSING} - set(found)
    if missing:
        raise FileFormatError(f"{source}: the fields {sorted(missing)} are missing")
    return found


def list_of(value: Any, source: str) -> list[Any]:
    """The value, a JSON list."""
    if not isinstance(value, list):
        raise FileFormatError(f"{source}: wanted a list; got {value!r}")
    return value


def sizes(value: Any, source: str) -> tuple[int, ...]:
    """The value, a JSON list of positive integers."""
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
        raise FileFormatError(f"{source}: wanted a list of sizes; got {value!r}")
    return tuple(value)
