"""A user's model from the command line: FILE.py:factory, weights, inputs, and each mistake's own message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tetris.errors import FileFormatError, TetrisError
from tetris.user_model import load_user_model, parse_block, parse_shape, parse_sparsity, split_target

SOURCE = """
import torch
from helper import WIDTH

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

def make_nothing():
    return None

def make_trouble():
    raise RuntimeError("no such layer\\nsecond line")

{extra}
"""


def write_model(folder: Path, extra: str = "") -> str:
    (folder / "helper.py").write_text("WIDTH = 8\n")
    (folder / "net.py").write_text(SOURCE.format(extra=extra))
    return str(folder / "net.py")


def test_model_with_weights_and_shape(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    state = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    for weights in ("w.safetensors", "w.pt"):
        user = load_user_model(f"{path}:make_model", tmp_path / weights, "3,8", dtype="bf16")
        assert not user.model.training and user.inputs.shape == (3, 8) and user.inputs.dtype == torch.bfloat16
        loaded = user.model.state_dict()
        assert all(torch.equal(loaded[name], state[name].bfloat16()) for name in state)


def test_example_inputs_of_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, "def example_inputs():\n    return (torch.ones(2, 8), torch.arange(3))")
    first, second = load_user_model(f"{path}:make_model", dtype="fp16").inputs
    assert first.dtype == torch.float16 and second.dtype == torch.int64


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_nothing", r"make_nothing\(\) should return an nn.Module; got NoneType"),
        ("make_trouble", r"make_trouble\(\) of .* failed: RuntimeError: no such layer \(line 12\)$"),
        ("absent", "has no function absent; it defines make_model, make_nothing, make_trouble"),
    ],
)
def test_bad_factories(tmp_path: Path, function: str, message: str) -> None:
    with pytest.raises(TetrisError, match=message):
        load_user_model(f"{write_model(tmp_path)}:{function}", input_shape="1,8")


def test_bad_files(tmp_path: Path) -> None:
    path = write_model(tmp_path, "1 / 0")
    with pytest.raises(TetrisError, match=r"does not import: ZeroDivisionError: division by zero \(line 14\)"):
        load_user_model(f"{path}:make_model", input_shape="1,8")
    path = write_model(tmp_path)
    with pytest.raises(TetrisError, match=r"pass --input 1,3,224,224 or define example_inputs\(\)"):
        load_user_model(f"{path}:make_model")
    with pytest.raises(TetrisError, match="wanted one of fp32, fp16, bf16; got 'int8'"):
        load_user_model(f"{path}:make_model", dtype="int8")
    for target, message in (("net.py", "wanted FILE.py:function"), ("absent.py:make", "there is no file absent.py")):
        with pytest.raises(TetrisError, match=message):
            split_target(target)


def test_bad_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.save({"0.weight": torch.zeros(16, 8), "other": torch.zeros(1)}, tmp_path / "names.pt")
    torch.save({**model.state_dict(), "0.weight": torch.zeros(2, 8)}, tmp_path / "shapes.pt")
    torch.save(model, tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("corrupt.pt", "corrupt.safetensors"):
        (tmp_path / name).write_bytes(b"not a weights file at all")
    messages = {
        "names.pt": "missing 0.bias, 2.bias, 2.weight; unexpected other",
        "shapes.pt": r"0.weight \(2, 8\) instead of \(16, 8\)",
        "pickled.pt": "more than tensors; save it with torch.save",
        "list.pt": "should hold a state dict .* got list",
        "corrupt.pt": "corrupt",
        "corrupt.safetensors": "cannot be read",
        "absent.pt": "there is no file",
    }
    for name, message in messages.items():
        with pytest.raises(FileFormatError, match=message):
            load_user_model(f"{path}:make_model", tmp_path / name, "1,8")


def test_parsing_of_options() -> None:
    assert parse_shape("1,3,224,224") == (1, 3, 224, 224) and parse_shape("2x8") == (2, 8)
    assert (parse_block("auto"), parse_block("32"), parse_block("64x32")) == ("auto", 32, (64, 32))
    assert parse_sparsity("0.73") == 0.73
    assert parse_sparsity("conv*=0.5, fc1=.9") == {"conv*": 0.5, "fc1": 0.9}
    for parse, text in ((parse_shape, "1,-3"), (parse_block, "8x8x8"), (parse_block, "0"), (parse_sparsity, "a=b")):
        with pytest.raises(TetrisError, match="wanted"):
            parse(text)
