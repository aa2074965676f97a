"""``python -m tetris.bench NAME``: run one bench, print its table, write its CSV.

Every ``bench/NAME_bench.py`` is a subcommand. It defines

- ``add_arguments(parser)``: its own options, beside the common ones below;
- ``run(args) -> list[Row]``: measure, on ``args.device``, less where ``args.quick``;
- optionally ``show(rows) -> str``: its table, where the common one will not do.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

from tetris.bench.report import table
from tetris.bench.rows import SKIPPED, write_csv

FOLDER = Path(__file__).resolve().parent
QUICK_OUT = Path("out/bench")
"""Where quick runs write: not over the results that the README's tables are made from."""


def bench_names() -> list[str]:
    """The benches there are, by their files."""
    return sorted(path.name.removesuffix("_bench.py") for path in FOLDER.glob("*_bench.py"))


def summary(name: str) -> str:
    """The first line of a bench's docstring; read, not imported: some benches take seconds to import."""
    source = (FOLDER / f"{name}_bench.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("``", "")


def results_folder(device: str) -> Path:
    """``results/h200``, ``results/cpu``, ...: the folder of a kind of device, by the GPU's short name."""
    from tetris.autotune.device import short_name

    return FOLDER / "results" / short_name(device)


def build_parser(names: list[str], modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The command line; options of a bench are added for the benches in ``modules``."""
    parser = argparse.ArgumentParser(
        prog="python -m tetris.bench", description="Run one bench, print its table, write its CSV."
    )
    commands = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name in names:
        module, about = modules.get(name), summary(name)
        command = commands.add_parser(name, help=about.replace("%", "%%"), description=about.replace("%", "%%"))
        command.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
        command.add_argument(
            "--out", type=Path, help=f"folder of the CSV (default: bench/results/<device>, {QUICK_OUT} with --quick)"
        )
        command.add_argument("--quick", action="store_true", help="few small cases: a check that it works")
        if module:
            module.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write. Returns the exit status."""
    import torch

    arguments = sys.argv[1:] if arguments is None else arguments
    names = bench_names()
    wanted = [name for name in names if name in arguments[:1]]
    modules = {name: importlib.import_module(f"tetris.bench.{name}_bench") for name in wanted}
    args = build_parser(names, modules).parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.out = args.out or (QUICK_OUT if args.quick else results_folder(args.device))
    module = modules[args.bench]
    rows = module.run(args)
    show = getattr(module, "show", table)
    print(show(rows))
    if all(row.status.startswith(SKIPPED) for row in rows):
        print("\nnothing was measured, nothing is written")
        return 0
    print(f"\n{write_csv(args.out / f'{args.bench}.csv', rows)}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
