"""What the commands do to a user's model, apart from parsing options: prune, plan, describe the machine."""

from __future__ import annotations

import copy
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import tetris
from tetris.autotune import device as machine
from tetris.autotune.compile_ahead import default_workers
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.plan_picture import plot_plan
from tetris.autotune.planner import plan as make_plan
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team
from tetris.autotune.timer import time_us
from tetris.autotune.tuner import apply_tuned, tune_model
from tetris.errors import FileFormatError, TetrisError
from tetris.files import atomic_directory, atomic_file
from tetris.plans import ModelPlan
from tetris.user_model import UserModel

MASKED_FILE = "masked.safetensors"
REPORT_FILE = "report.txt"
FAST_FILE = "fast.safetensors"


def prune_user_model(
    user: UserModel,
    out: Path,
    options: dict[str, Any],
    console: Console,
    plan_path: Path | None = None,
    overwrite: bool = False,
    weight_dtype: str | None = None,
) -> None:
    """Prune -> convert -> verify -> time -> save; ``out`` appears complete or not at all.

    ``out`` holds the converted model (``fast.safetensors``, for ``tetris.load``), the masked weights under the model's
    own names (``masked.safetensors``), and ``report.txt``: what became of each layer, the verification and both times.

    Args:
        options: of ``tetris.prune``, but for the model and its inputs.
        plan_path: a plan's JSON instead of sparsity and block.
        weight_dtype: of ``tetris.convert``.
    Raises:
        TetrisError: bad options, a model that does not run, a conversion outside its tolerance (nothing is saved).
    """
    if plan_path is not None:
        options = options | {"plan": ModelPlan.load(plan_path)}
    check_free(out, overwrite)
    check_runs(user)
    with _progress(console) as progress:
        task = progress.add_task("prune", total=None)

        def on_layer(name: str, done: int, total: int) -> None:
            progress.update(task, description=f"prune {name}", completed=done, total=total)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruned = tetris.prune(user.model, example_inputs=user.inputs, progress=on_layer, **options)
            progress.update(task, description="convert")
            plan = options.get("plan")
            fast = tetris.convert(pruned, example_inputs=user.inputs, plan=plan, weight_dtype=weight_dtype)
        apply_tuned(fast, user.inputs)
        progress.update(task, description="verify")
        report = tetris.verify(pruned, fast, example_inputs=user.inputs)
        progress.remove_task(task)
    for warning in caught:
        console.print(f"note: {warning.message}", highlight=False, markup=False, soft_wrap=True)
    console.print(str(fast.conversion), highlight=False, markup=False, soft_wrap=True)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if not report.passed:
        raise TetrisError(
            "prune: the converted model differs from the masked one by more than the tolerance; not saved"
        )
    times = timing_line(user, fast)
    console.print(times, highlight=False)
    with atomic_directory(out, overwrite) as folder:
        tetris.save(fast, folder / FAST_FILE)
        save_masked_weights(pruned, folder / MASKED_FILE)
        (folder / REPORT_FILE).write_text(f"{fast.conversion}\n\n{report}\n{times}\n", encoding="utf-8")
    console.print(
        f"{out}: {FAST_FILE} for tetris.load, {MASKED_FILE}, {REPORT_FILE}. "
        "To win accuracy back, fine-tune the result of tetris.prune in Python before converting it.",
        highlight=False,
        soft_wrap=True,
    )


def plan_user_model(
    user: UserModel,
    out: Path,
    options: dict[str, Any],
    console: Console,
    overwrite: bool = False,
    picture: Path | None = None,
) -> None:
    """Measure and choose (``tetris.plan`` with ``options``), print the table, write the JSON and the picture."""
    check_free(out, overwrite)
    check_runs(user)
    with _progress(console) as progress:
        task = progress.add_task("measure", total=None)

        def on_layer(name: str, done: int, total: int) -> None:
            progress.update(task, description=f"measure {name}", completed=done, total=total)

        plan = make_plan(user.model, user.inputs, progress=on_layer, **options)
    console.print(str(plan), highlight=False, markup=False, soft_wrap=True)
    plan.save(out)
    if picture is not None:
        console.print(f"{plot_plan(plan, picture)}: speedup of every block", highlight=False, soft_wrap=True)
    console.print(f"{out}: use it with `tetris prune --plan {out}`", highlight=False, soft_wrap=True)


def tune_user_model(
    user: UserModel, sparsity: Any, block: Any, seed: int, console: Console, budget: int | None = 24
) -> None:
    """Prune and convert as ``tetris prune`` would, then search kernel configurations and store the best.

    Started by torchrun, the processes share the layers, each on its own GPU, and the one store; the first one reports.
    """
    check_runs(user)
    device = next(user.model.parameters(), torch.zeros(0)).device
    with CompileServer(str(device), default_workers()) as server:  # they start while the model is pruned
        pruned = tetris.prune(user.model, sparsity, block, "sort", example_inputs=user.inputs, seed=seed)
        fast = tetris.convert(pruned, example_inputs=user.inputs)
        store, team = TuningStore(), Team.of_torchrun()
        console.quiet = team.rank > 0
        with _progress(console) as progress:
            task = progress.add_task("tune", total=None)

            def on_layer(name: str, done: int, total: int) -> None:
                progress.update(task, description=f"tune {name}", completed=done, total=total)

            tuning = tune_model(
                fast, user.inputs, store=store, budget=budget, team=team, progress=on_layer, server=server
            )
    console.print(str(tuning), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{store.path}: {len(store.mine)} tuned choices", highlight=False, soft_wrap=True)


def environment_table() -> Table:
    """Versions, devices, the store of tuned choices."""
    store = TuningStore()
    table = Table(show_header=False, title="tetris", title_justify="left")
    table.add_row("tetris-sparse", tetris.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("versions", machine.versions())
    table.add_row("cpu", machine.device_name("cpu"))
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        table.add_row(f"gpu {index}", f"{machine.device_name(f'cuda:{index}')}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        table.add_row("gpu", "none; layers run on the CPU path")
    table.add_row("tuned choices", f"{len(store.mine)} in {store.path}, {len(store.shipped)} shipped")
    return table


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse an output path that exists, or where nothing can be written, before any work is done."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FileFormatError(f"{out}: cannot be written, {parent} is no folder or is read-only; choose another path")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise FileFormatError(f"{out}: exists already; choose another path or pass --force to replace it")


@torch.no_grad()
def check_runs(user: UserModel) -> None:
    """Run the model once on its example inputs; its own exception becomes one sentence."""
    try:
        call(user.model, user.inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise TetrisError(
            f"model: {type(user.model).__name__} does not run on inputs of {_shapes(user.inputs)}: "
            f"{type(error).__name__}: {first_line}; correct --input or example_inputs()"
        ) from error


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def timing_line(user: UserModel, fast: nn.Module, repeats: int = 20, budget_s: float = 10.0) -> str:
    """Both models on the example inputs, interleaved, in words."""
    device = next((p.device for p in user.model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        times = time_us(
            {"dense": lambda: call(user.model, user.inputs), "fast": lambda: call(fast, user.inputs)},
            device=device,
            repeats=repeats,
            budget_s=budget_s,
        )
    dense, converted = times["dense"].median_us, times["fast"].median_us
    return (
        f"on {machine.device_name(device)}: dense {dense / 1e3:.3f} ms, converted {converted / 1e3:.3f} ms: "
        f"{dense / converted:.2f}x{' (slower)' if converted > dense else ''}"
    )


def save_masked_weights(pruned: nn.Module, path: Path) -> None:
    """The masked weights, zeros included, under the original model's names."""
    from safetensors.torch import save_file

    from tetris.masking import bake_masks

    state = bake_masks(copy.deepcopy(pruned)).state_dict()
    with atomic_file(path) as temporary:  # which gets a new file's permissions; safetensors' own are the user's alone
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, temporary)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would leave an empty line in a log
    )


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, torch.Tensor):
        return f"shape {tuple(inputs.shape)}"
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return "shapes " + ", ".join(str(tuple(v.shape)) if isinstance(v, torch.Tensor) else repr(v) for v in values)
