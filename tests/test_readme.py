"""The README keeps its promises: its Python runs, its tables are what the CSV files say, its links lead somewhere."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tetris.bench.readme import FILES, RESULTS, TABLES, ReadmeTable, fill, main, percent, times
from tetris.bench.rows import Row, write_csv
from tetris.errors import FileFormatError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("source", python_blocks())
def test_python_blocks_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["y"].shape == (16, 10)  # type: ignore[attr-defined]
    assert "end to end" in capsys.readouterr().out.lower()
    assert not list(tmp_path.rglob("*.pkl")) and any(tmp_path.iterdir())


def test_there_is_one_example_of_about_twenty_lines() -> None:
    (example,) = python_blocks()
    assert len(example.strip().splitlines()) <= 25


def test_tables_are_what_the_csv_files_say() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    assert README in texts and [fill(t, TABLES, RESULTS) for t in texts] == texts, "run `python -m tetris.bench.readme`"
    shown = [name for text in texts for name in re.findall(r"<!-- table ([\w-]+) -->", text)]
    assert sorted(shown) == sorted(TABLES), "every table is shown once"


def test_links_lead_to_files() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README) if "://" not in t]
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert targets and not missing


def test_the_modules_it_names_exist() -> None:
    named = set(re.findall(r"`((?:tetris|kernels|autotune|bench|tests)/[\w/.]*)`", README))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert named and not missing


def test_the_commands_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (demo|test|lint|format|clean)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def small_table(tmp_path: Path) -> dict[str, ReadmeTable]:
    rows = [
        Row("b", "x", "paper", speedup=1.5, extra={"kept": 0.27}),
        Row("b", "y", "none", speedup=math.nan, extra={"kept": 0.5}),
        Row("b", "z", "none", speedup=9.0, extra={"kept": 0.1}),
    ]
    write_csv(tmp_path / "t.csv", rows)
    columns = (("case", "case", str), ("kept", "kept", percent), ("gain", "speedup", times))
    return {"t": ReadmeTable("t.csv", columns, keep=lambda row: row.case != "z")}


def test_filling_replaces_what_stood_there_and_shows_gaps_as_dashes(tmp_path: Path) -> None:
    tables = small_table(tmp_path)
    text = "before\n<!-- table t -->\nold\n<!-- end t -->\nafter"
    filled = fill(text, tables, tmp_path)
    lines = filled.splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in filled
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["case", "kept", "gain"]
    assert cells[2:] == [["x", "27.0 %", "1.50x"], ["y", "50.0 %", "-"]]
    assert fill(filled, tables, tmp_path) == filled


def test_bad_markers_and_missing_files_are_errors(tmp_path: Path) -> None:
    tables = small_table(tmp_path)
    with pytest.raises(FileFormatError, match="no table is called 'u'"):
        fill("<!-- table u -->\n<!-- end u -->", tables, tmp_path)
    with pytest.raises(FileFormatError, match="lost marker"):
        fill("<!-- table t -->\n", tables, tmp_path)
    (tmp_path / "t.csv").unlink()
    with pytest.raises(FileFormatError, match="run the bench first"):
        fill("<!-- table t -->\n<!-- end t -->", tables, tmp_path)


def test_check_tells_an_outdated_readme(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    assert main(["--check", "--file", str(copy)]) == 0
    copy.write_text(README.replace("<!-- end demo -->", "stray\n<!-- end demo -->"), encoding="utf-8")
    assert main(["--check", "--file", str(copy)]) == 1
    assert main(["--file", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == README
