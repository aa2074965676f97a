"""The command line: ``tetris demo | prune | plan | tune | tuned | info | bench``.

Whatever goes wrong ends in one message on stderr: exit code 1 for bad input or files, 2 for wrong options. Outputs are
written whole or not at all. Imports that take longer than torch's own happen inside the commands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from tetris.errors import TetrisError

if TYPE_CHECKING:
    from tetris.user_model import UserModel

app = typer.Typer(
    help="Reorder channels, prune whole blocks, run the rest fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Target = Annotated[str, typer.Argument(metavar="FILE.py:FUNCTION", help="Returns the model, e.g. net.py:make_model.")]
Weights = Annotated[Path | None, typer.Option(help="State dict to load: .safetensors or a torch.save file.")]
InputShape = Annotated[
    str | None, typer.Option("--input", help="Shape such as 1,3,224,224; otherwise the file's example_inputs().")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at --out.")]


@app.command()
def demo(
    dataset: Annotated[str, typer.Option(help="digits (ships with scikit-learn) or mnist.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Directory of the four MNIST files.")] = None,
    out: Annotated[Path, typer.Option(help="Where report.html and the rest go.")] = Path("out"),
    device: Device = None,
    seed: Seed = 0,
    methods: Annotated[
        str, typer.Option(help="Besides element-wise: none, sort, paper, batched, exact, annealed.")
    ] = "none,sort,paper",
    quick: Annotated[bool, typer.Option("--quick", help="One block size, two sparsities.")] = False,
) -> None:
    """The paper's experiment on LeNet: train, prune in four ways, fine-tune, convert, verify, measure.

    An interrupted run goes on where it stopped when it is started again with the same options.
    """
    from tetris.demo.experiment import Settings
    from tetris.demo.run import run_demo

    settings = Settings.for_dataset(dataset, seed, quick, tuple(name.strip() for name in methods.split(",")))
    console = Console()
    try:
        run_demo(out, settings, dataset, data, checked_device(device), console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this stopped")
        raise


@app.command()
def prune(
    target: Target,
    out: Annotated[Path, typer.Option(help="New directory for the fast model and the report.")],
    sparsity: Annotated[str, typer.Option(help="Fraction to prune: 0.73, or 'conv*=0.5,fc1=0.9' by layer.")] = "0.73",
    block: Annotated[str, typer.Option(help="auto, a size such as 32, or OUTxIN such as 64x32.")] = "auto",
    method: Annotated[
        str, typer.Option(help="none, sort (seconds), paper, batched, exact or annealed (best).")
    ] = "annealed",
    importance: Annotated[str, typer.Option(help="l1 or l2.")] = "l1",
    weights: Weights = None,
    input_shape: InputShape = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    plan: Annotated[
        Path | None, typer.Option(help="Decisions by layer from `tetris plan`; replaces sparsity, block.")
    ] = None,
    weight_dtype: Annotated[
        str | None, typer.Option(help="int8 or float8_e4m3fn: pruned linear layers' weights in one byte.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Prune, convert, verify and save your own model: masked weights to fine-tune and the fast model beside them."""
    from tetris.commands import prune_user_model
    from tetris.user_model import parse_block, parse_sparsity

    options: dict[str, Any] = {"method": method, "importance": importance, "seed": seed}
    if plan is None:
        options |= {"sparsity": parse_sparsity(sparsity), "block": parse_block(block)}
    user = _user_model(target, weights, input_shape, device, dtype, seed)
    prune_user_model(user, out, options, Console(), plan_path=plan, overwrite=force, weight_dtype=weight_dtype)


@app.command()
def plan(
    target: Target,
    out: Annotated[Path, typer.Option(help="The plan's JSON file.")],
    sparsity: Annotated[str, typer.Option(help="As for prune, or auto: a budget chooses each layer's.")] = "0.73",
    blocks: Annotated[
        str, typer.Option(help="Blocks to measure: 32,64 or 64x32,64x64; auto suits the device.")
    ] = "auto",
    target_speedup: Annotated[float | None, typer.Option(help="Reach this at the least lost importance.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Fraction of the importance that may go.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw every layer's speedup per block: .png, .svg.")] = None,
    whole: Annotated[
        str, typer.Option(help="Run the whole network at the end: eager, graph, compile, auto or none.")
    ] = "auto",
    weights: Weights = None,
    input_shape: InputShape = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Measure every layer at several block sizes on this machine and choose; `tetris prune --plan` takes the file."""
    from tetris.commands import plan_user_model
    from tetris.user_model import parse_block, parse_sparsity

    options: dict[str, Any] = {
        "sparsity": "auto" if sparsity == "auto" else parse_sparsity(sparsity),
        "blocks": None if blocks == "auto" else tuple(parse_block(part.strip()) for part in blocks.split(",")),
        "target_speedup": target_speedup,
        "max_importance_loss": max_loss,
        "seed": seed,
        "whole": None if whole == "none" else whole,
    }
    user = _user_model(target, weights, input_shape, device, dtype, seed)
    plan_user_model(user, out, options, Console(), overwrite=force, picture=plot)


@app.command()
def tune(
    target: Target,
    weights: Weights = None,
    input_shape: InputShape = None,
    dtype: Dtype = "fp16",
    sparsity: Annotated[str, typer.Option(help="As for prune.")] = "0.73",
    block: Annotated[str, typer.Option(help="As for prune.")] = "auto",
    budget: Annotated[int, typer.Option(help="Configurations to measure for every distinct layer.")] = 24,
    full: Annotated[bool, typer.Option("--full", help="Measure all that are worth it, whatever the budget.")] = False,
    seed: Seed = 0,
) -> None:
    """Time kernel configurations for your model's layers on this GPU and remember the best.

    `torchrun --nproc-per-node 4 -m tetris.cli tune ...` spreads the layers over four GPUs. An interrupted run goes on
    where it stopped.
    """
    import torch

    from tetris.autotune.team import local_gpu
    from tetris.commands import tune_user_model
    from tetris.user_model import parse_block, parse_sparsity

    gpu = local_gpu()
    if gpu != "cpu" and not torch.cuda.is_available():
        raise TetrisError("tune: it times GPU kernels; this machine (or this torch build) has no usable GPU")
    if ":" in gpu:
        torch.cuda.set_device(gpu)
    user = _user_model(target, weights, input_shape, gpu, dtype, seed)
    tune_user_model(user, parse_sparsity(sparsity), parse_block(block), seed, Console(), None if full else budget)


@app.command()
def tuned(
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write this user's tuned choices to a file.")
    ] = None,
    import_from: Annotated[Path | None, typer.Option("--import", help="Merge such a file; the faster stay.")] = None,
) -> None:
    """Say which tuned choices there are, or carry them to another machine."""
    from tetris.autotune.store import TuningStore

    store, console = TuningStore(), Console()
    if import_from is not None:
        console.print(f"{store.import_from(import_from)} choices taken from {import_from}", highlight=False)
    if export_to is not None:
        console.print(f"{store.export(export_to)} choices written to {export_to}", highlight=False)
    console.print(f"{len(store.mine)} choices in {store.path}, {len(store.shipped)} shipped", highlight=False)


@app.command()
def info() -> None:
    """Versions, devices and where tuned choices are kept."""
    from tetris.commands import environment_table

    Console().print(environment_table())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run a benchmark: `tetris bench NAME ...`, the same as `python -m tetris.bench`; --help lists them."""
    from tetris.bench.__main__ import main as run_bench

    raise typer.Exit(run_bench(list(context.args)))


def checked_device(device: str | None) -> str:
    """The device to use: the one asked for if this machine has it, the GPU where there is one otherwise."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise TetrisError(f"device: wanted cpu or cuda; got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TetrisError("device: cuda was asked for; this machine (or this torch build) has no usable GPU; try cpu")
    return device


def _user_model(
    target: str, weights: Path | None, input_shape: str | None, device: str | None, dtype: str, seed: int
) -> UserModel:
    from tetris.user_model import load_user_model

    return load_user_model(target, weights, input_shape, checked_device(device), dtype, seed)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The ``tetris`` command: run, or print one message and exit with 1 (input, files) or 2 (options)."""
    try:
        app(args=arguments, prog_name="tetris")
    except TetrisError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _fail(f"the GPU's memory is full; use a smaller input batch or --dtype fp16 ({str(error).splitlines()[0]})")
    sys.exit(0)


def _fail(message: str, code: int = 1) -> NoReturn:
    Console(stderr=True).print(f"tetris: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
