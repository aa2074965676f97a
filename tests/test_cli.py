"""The command line, as a user runs it: what it writes and says, its exit codes, and that a failure leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tetris
from tetris.cli import main

SOURCE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64))

def example_inputs():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)

def make_branching():
    return Branching()

def make_nan():
    model = make_model()
    model[4].weight.data[3, 5] = float("nan")
    return model

def make_tiny():
    return nn.Sequential(nn.Linear(4, 4))


def make_bare():
    return nn.Linear(64, 64)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def run(*arguments: object) -> int:
    """The exit code of ``tetris ARGUMENTS``."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def made_by(net: Path) -> nn.Module:
    names: dict[str, object] = {}
    exec(net.read_text(), names)
    return names["make_model"]()  # type: ignore[operator]


def test_prune_saves_a_fast_model_masked_weights_and_a_report(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: torch.randn_like(tensor) for name, tensor in made_by(net).state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    out = tmp_path / "out"
    code = run(
        "prune", f"{net}:make_model", "--weights", tmp_path / "w.safetensors", "--sparsity", "0.75", "--block", "16x32",
        "--method", "paper", "--out", out, "--device", "cpu",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0, text
    assert sorted(path.name for path in out.iterdir()) == ["fast.safetensors", "masked.safetensors", "report.txt"]

    masked = load_file(out / "masked.safetensors")
    assert masked.keys() == weights.keys()
    kept = masked["4.weight"] != 0
    assert kept.float().mean() == 0.25
    assert torch.equal(masked["4.weight"][kept], weights["4.weight"][kept])
    assert torch.equal(masked["0.weight"], weights["0.weight"]), "three input channels: left dense"

    model = made_by(net)
    model.load_state_dict(masked)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(tetris.load(out / "fast.safetensors")(x), model(x), rtol=1e-4, atol=1e-4)
    assert "end to end" in text and "dense" in text and "converted" in text
    report = (out / "report.txt").read_text()
    assert report.count("ms") == 2 and "block-sparse  16x32" in report and not text.startswith("\n")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "safetensors' own files are private"


def test_force_replaces_and_its_absence_refuses(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ("prune", f"{net}:make_model", "--block", "32", "--method", "none", "--out", out, "--device", "cpu")
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert run(*arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(*arguments[:-3], out / "mine.txt" / "deeper", "--device", "cpu") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert run(*arguments, "--force") == 0
    assert not (out / "mine.txt").exists() and (out / "fast.safetensors").exists()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("make_model", ("--sparsity", "1.5"), r"[0, 1)"),
        ("make_model", ("--sparsity", "most"), "a number such as 0.73"),
        ("make_model", ("--sparsity", "conv9=0.5"), "'conv9' matches no prunable layer"),
        ("make_model", ("--block", "3x3x3"), "wanted auto, a size such as 32"),
        ("make_model", ("--method", "magic"), "'magic'"),
        ("make_model", ("--input", "2,5,8,8"), "does not run on inputs of shape (2, 5, 8, 8)"),
        ("make_model", ("--weights", "nowhere.pt"), "there is no file nowhere.pt"),
        ("make_model", ("--plan", "nowhere.json"), "no such file"),
        ("make_model", ("--device", "tpu"), "wanted cpu or cuda; got 'tpu'"),
        ("make_model", ("--dtype", "int4"), "wanted one of fp32, fp16, bf16"),
        ("make_nan", (), "1 NaN or Inf"),
        ("make_tiny", ("--input", "2,4"), "no layer has 16 input and output channels"),
        ("make_bare", ("--input", "2,64"), "got a bare Linear; wrap it in nn.Sequential"),
        ("absent", (), "has no function absent"),
    ],
)
def test_bad_input_is_one_message_and_no_output(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], function: str, options: tuple[str, ...], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    code = run("prune", f"{net}:{function}", "--out", tmp_path / "out", *options)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("tetris: ") and "Traceback" not in captured.err
    assert message in captured.err
    after = [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"]
    assert after == before, "nothing half-written is left behind"


def test_a_model_that_cannot_be_traced_says_so_and_still_works(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run("prune", f"{net}:make_branching", "--input", "2,64", "--block", "16", "--out", out, "--device", "cpu")
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "note: convert" in captured.out and "torch.fx" in captured.out


@pytest.mark.parametrize(
    "arguments", [("prune",), ("prune", "a.py:b", "--speed", "9"), ("fly",), ("demo", "--seed", "x")]
)
def test_wrong_options_exit_with_two(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_demo_reports_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--dataset", "mnist", "--data", tmp_path, "--out", tmp_path / "out") == 1
    assert "lacks train-images-idx3-ubyte" in capsys.readouterr().err
    assert run("demo", "--methods", "none,magic", "--out", tmp_path / "out") == 1
    assert "got magic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_names_versions_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    assert run("info") == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in text and "tuned choices" in text and "gpu" in text


def test_an_unwritable_place_is_one_message(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert run("prune", f"{net}:make_model", "--block", "32", "--method", "none", "--out", out, "--device", "cpu") == 1
    assert "Not a directory" in capsys.readouterr().err or not out.exists()


def test_the_module_runs_as_a_command() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tetris.cli", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert child.returncode == 0, child.stderr
    for command in ("demo", "prune", "plan", "tune", "info", "bench"):
        assert command in child.stdout


def test_bench_passes_its_arguments_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--help") == 0
    text = capsys.readouterr().out
    assert "python -m tetris.bench" in text and "The CPU path against dense PyTorch" in text
    assert run("bench", "nothing-of-that-name") == 2
