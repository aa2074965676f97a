"""The commands that measure: plan, tune, tuned, bench; and how ``tetris`` ends when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.fake_gpu import H200
from tetris import cli, commands
from tetris.autotune.compile_server import CompileServer
from tetris.autotune.store import TuningStore
from tetris.autotune.tuner import Tuning
from tetris.errors import TetrisError
from tetris.kernels.configs import LinearConfig, LinearProblem
from tetris.plans import ModelPlan
from tetris.tuned_choices import Entry

SOURCE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

def example_inputs():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
"""
ENTRY = Entry(
    H200.name, H200.capability, H200.triton_version, LinearProblem(8, 64, 64, (16, 16), "float16", 8), LinearConfig(),
    2.0, 3.0, 4,
)  # fmt: skip


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def run(*arguments: object) -> int:
    """The exit code of ``tetris ARGUMENTS``."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_plan_measures_writes_and_draws(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--sparsity", "0.5", "--blocks", "16,32x16", "--plot", picture, "--out", out, "--device", "cpu")
    assert run("plan", f"{net}:make_model", *options) == 0
    text = capsys.readouterr().out
    plan = ModelPlan.load(out)
    assert [layer.name for layer in plan] == ["0", "2"]
    assert {candidate.block for candidate in plan["0"].candidates} >= {None, (32, 16)}
    assert picture.read_bytes().startswith(b"\x89PNG") and f"tetris prune --plan {out}" in text.replace("\n", "")
    assert run("plan", f"{net}:make_model", *options) == 1
    assert "exists already" in capsys.readouterr().err


def test_tune_prunes_as_prune_would_and_tells_the_store(
    net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    servers: list[CompileServer] = []

    def tune_model(model, inputs, *, store, budget, team, progress, server):
        progress("0", 0, 1)
        servers.append(server)
        seen.update(
            budget=budget, world=team.world, kept=model.get_submodule("0").kept_fraction, shape=tuple(inputs.shape)
        )
        store.put([ENTRY])
        return Tuning([ENTRY])

    monkeypatch.setattr(commands, "tune_model", tune_model)
    monkeypatch.setattr("tetris.autotune.team.local_gpu", lambda: "cpu")
    options = ("--sparsity", "0.75", "--block", "16", "--budget", "7", "--dtype", "fp32")
    assert run("tune", f"{net}:make_model", *options) == 0
    assert seen == {"budget": 7, "world": 1, "kept": 0.25, "shape": (4, 64)}
    assert servers[0].device == "cpu" and servers[0].process.poll() is not None, "it ends with the command"
    text = capsys.readouterr().out
    assert "1.50" in text and "1 tuned choices" in text


def test_tune_says_that_it_needs_a_gpu(
    net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("tune", f"{net}:make_model") == 1
    assert "tune: it times GPU kernels" in capsys.readouterr().err


def test_tuned_choices_travel(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    TuningStore().put([ENTRY])
    file = tmp_path / "choices.json"
    assert run("tuned", "--export", file) == 0
    assert f"1 choices written to {file}" in capsys.readouterr().out.replace("\n", "")
    assert json.loads(file.read_text())
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "other"))
    assert run("tuned", "--import", file) == 0
    assert "1 choices taken from" in capsys.readouterr().out and list(TuningStore().mine.values()) == [ENTRY]


def test_info_lists_gpus(net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert run("info") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA H200, compute capability 9.0" in text


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.checked_device(None) == "cuda" and cli.checked_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.checked_device(None) == "cpu"
    with pytest.raises(TetrisError, match="no usable GPU"):
        cli.checked_device("cuda")


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OutOfMemoryError("tried to allocate 2 GiB\nmore"), 1, "smaller input batch or --dtype fp16"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (TetrisError("wanted this; got that"), 1, "wanted this; got that"),
    ],
)
def test_failures_end_in_one_message(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    assert run() == code
    assert message in capsys.readouterr().err


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main([])


def test_an_interrupted_demo_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tetris.demo.run.run_demo", interrupted)
    assert run("demo", "--quick", "--out", tmp_path / "out", "--device", "cpu") == 130
    assert "goes on where this stopped" in capsys.readouterr().out


def test_models_are_called_with_tensors_tuples_and_names() -> None:
    assert commands.call(lambda x: x + 1, 1) == 2  # type: ignore[arg-type]
    assert commands.call(lambda x, y: x - y, (3, 1)) == 2  # type: ignore[arg-type]
    assert commands.call(lambda x, y: x - y, {"y": 1, "x": 3}) == 2  # type: ignore[arg-type]
    assert commands._shapes({"x": torch.zeros(2, 3), "n": 5}) == "shapes (2, 3), 5"
