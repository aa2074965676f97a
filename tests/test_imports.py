"""Imports point down: a module imports only from its own layer's kin and from layers below. Read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tetris

PACKAGE = Path(tetris.__file__).parent
PUBLIC_FUNCTIONS = ("reorder", "prune", "plan", "convert", "verify", "save", "load")

LAYERS: dict[str, int] = {
    # L0: pure data
    "errors": 0,
    "files": 0,
    "json_fields": 0,
    "layout": 0,
    "permutation": 0,
    "plans": 0,
    "tolerances": 0,
    # L1: definitions
    "importance": 1,
    "pruning": 1,
    "packing": 1,
    "quantization": 1,
    "reference": 1,
    "algorithm1": 1,
    "models": 1,
    # L2: device code and launchers
    "kernels": 2,
    # L3: operators and the search
    "dispatch": 3,
    "eager": 3,
    "tuned_choices": 3,
    "registration": 3,
    "ops": 3,
    "search": 3,
    "reordering": 3,
    "joint_reordering": 3,
    # L4: modules, graphs, model -> model
    "block_sparse_layer": 4,
    "layers": 4,
    "stem": 4,
    "channels": 4,
    "groups_picture": 4,
    "fusion": 4,
    "orders": 4,
    "tracing": 4,
    "graph": 4,
    "graph_json": 4,
    "specs": 4,
    "layer_searches": 4,
    "masking": 4,
    "conversion": 4,
    "verification": 4,
    "serialization": 4,
    # L5 to L7: measuring, comparing, showing
    "autotune": 5,
    "bench": 6,
    "user_model": 7,
    "commands": 7,
    "demo": 7,
    "cli": 7,
}
"""The layer of every module and sub-package; what is not listed here fails. A layer may import its own kin."""

ALLOWED_UP: set[tuple[str, str]] = set()
"""(importer, imported) pairs that point up on purpose, inside functions only; each with its reason beside it."""


def sources() -> list[Path]:
    """Every module of the package, links followed."""
    top = [*PACKAGE.glob("*.py")]
    return sorted(top + [p for folder in PACKAGE.iterdir() if folder.is_dir() for p in folder.rglob("*.py")])


def room_of(path: Path) -> str:
    """The module or sub-package that a file belongs to: ``tetris/kernels/cpu/conv2d.py`` -> ``kernels``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(tree: ast.AST) -> list[tuple[str, int]]:
    """(room, line) of every import of the package, within functions too; imports for type checkers are not counted."""
    found: list[tuple[str, int]] = []
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tetris":
                found.append((parts[1] if len(parts) > 1 else "__init__", node.lineno))
    return found


def run_time_nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes except those under ``if TYPE_CHECKING:``."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        nodes += [child, *run_time_nodes(child)]
    return nodes


def test_every_module_has_a_layer_and_imports_only_downwards() -> None:
    wrong, unknown = [], set()
    for path in sources():
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        if room not in LAYERS:
            unknown.add(room)
            continue
        for target, line in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
            if target in PUBLIC_FUNCTIONS or target == "__init__":  # `import tetris` is for the top alone
                target_layer = 6
            elif target in LAYERS:
                target_layer = LAYERS[target]
            else:
                unknown.add(target)
                continue
            if target_layer > LAYERS[room] and (room, target) not in ALLOWED_UP:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} (L{LAYERS[room]}) imports {target} (L{target_layer})")
    assert not unknown, f"give these a layer in LAYERS: {sorted(unknown)}"
    assert not wrong, "imports that point up:\n" + "\n".join(wrong)


def test_no_cycles_between_rooms() -> None:
    edges: dict[str, set[str]] = {}
    for path in sources():
        room = room_of(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges.setdefault(room, set()).update(t for t, _ in imported_rooms(tree) if t in LAYERS and t != room)
    done: set[str] = set()

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, "a cycle: " + " -> ".join((*trail, room))
        if room not in done:
            for target in sorted(edges.get(room, ())):
                visit(target, (*trail, room))
            done.add(room)

    for room in sorted(edges):
        if room not in ("__init__", "__main__"):
            visit(room, ())


def test_no_module_has_the_name_of_a_public_function() -> None:
    rooms = {room_of(path) for path in sources()}
    assert not rooms & set(PUBLIC_FUNCTIONS), "importing the module would replace the function"
    for name in PUBLIC_FUNCTIONS:
        assert callable(getattr(tetris, name)), name


@pytest.mark.parametrize("module", ["tetris", "tetris.cli", "tetris.autotune.timer"])
def test_importing_needs_no_triton(module: str) -> None:
    """Without triton (macOS) everything but the GPU kernels works: a child process in which it cannot be imported."""
    script = f"import sys; sys.modules['triton'] = None; import {module}; print('fine')"
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert child.stdout.strip() == "fine", child.stderr
