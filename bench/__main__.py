"""``python -m tetris.bench NAME``: run one bench, print its table, write its CSV.

Every ``bench/NAME_bench.py`` is a subcommand. It defines

- ``add_arguments(parser)``: its own options, beside the common ones below;
- ``run(args) -> list[Row]``: measure, on ``args.device``, less where ``args.quick``;
- optionally ``show(rows) -> str``: its table, where the common one will not do.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from tetris.bench.report import table
from tetris.bench.rows import write_csv

FOLDER = Path(__file__).resolve().parent


def bench_names() -> list[str]:
    """The benches there are, by their files."""
    return sorted(path.name.removesuffix("_bench.py") for path in FOLDER.glob("*_bench.py"))


def results_folder(device: str) -> Path:
    """``results/h200``, ``results/cpu``, ...: the folder of a kind of device, by the GPU's short name."""
    from tetris.autotune.device import short_name

    return FOLDER / "results" / short_name(device)


def build_parser(names: list[str], modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """The command line; options of a bench are added for the benches in ``modules``."""
    parser = argparse.ArgumentParser(prog="python -m tetris.bench", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(names) + "}")
    for name in names:
        module = modules.get(name)
        summary = (module.__doc__ or "").splitlines()[0] if module else None
        command = commands.add_parser(name, description=summary)
        command.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
        command.add_argument("--out", type=Path, help="folder of the CSV (default: bench/results/<device>)")
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
    args.out = args.out or results_folder(args.device)
    module = modules[args.bench]
    rows = module.run(args)
    show = getattr(module, "show", table)
    print(show(rows))
    print(f"\n{write_csv(args.out / f'{args.bench}.csv', rows)}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
