"""Bench rows, cases and reports: what is written is what is read, and the cases are the networks they claim to be."""

from __future__ import annotations

import math

import pytest
import torch

from tetris.bench import __main__ as bench
from tetris.bench import cases, report
from tetris.bench.rows import Row, read_csv, replaced, write_csv
from tetris.errors import FileFormatError

ROWS = [
    Row("conv", "conv1_1", "cudnn", 10.0, 9.0, 11.0, flop=2e9, bytes=1e6, speedup=1.0, device="d", extra={"batch": 8}),
    Row("conv", "conv1_1", "tetris", 5.0, 4.0, 6.0, flop=1e9, speedup=2.0, error=1e-3, extra={"block": "64x32"}),
    Row("conv", "conv1_1", "broken", status="wrong"),
]


def test_rows_of_measured_cases_take_the_place_of_old_ones(tmp_path) -> None:
    file = tmp_path / "conv.csv"
    new = [Row("conv", case, "tetris", time) for case, time in (("b", 2.0), ("d", 4.0))]
    assert replaced(file, new) == new  # no file yet
    write_csv(file, [Row("conv", case, p, 9.0) for case in "abc" for p in ("cudnn", "tetris")])
    rows = [(row.case, row.provider, row.median_us) for row in replaced(file, new)]
    others = [(case, provider, 9.0) for case in "ac" for provider in ("cudnn", "tetris")]
    assert rows == [*others[:2], ("b", "tetris", 2.0), *others[2:], ("d", "tetris", 4.0)]


def test_csv_round_trip(tmp_path) -> None:
    back = read_csv(write_csv(tmp_path / "a" / "conv.csv", ROWS))
    assert [(r.case, r.provider, r.status, r.extra) for r in back] == [
        (r.case, r.provider, r.status, r.extra) for r in ROWS
    ]
    assert back[1].median_us == 5.0 and back[1].tflops == pytest.approx(200)
    assert math.isnan(back[2].median_us) and math.isnan(back[0].error)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = write_csv(tmp_path / "conv.csv", ROWS)
    with pytest.raises(ValueError, match="rename"):
        write_csv(path, [Row("conv", "x", "y", extra={"case": "clash"})])
    assert len(read_csv(path)) == 3 and [p.name for p in tmp_path.iterdir()] == ["conv.csv"]


def test_foreign_and_missing_files_are_refused(tmp_path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileFormatError, match="provider"):
        read_csv(tmp_path / "other.csv")


def test_tables_show_wrong_rows_without_a_time() -> None:
    assert "wrong" in report.table(ROWS, extra=["block"]) and "64x32" in report.table(ROWS, extra=["block"])
    assert "2.00" in report.pivot(ROWS) and "wrong" in report.pivot(ROWS)
    assert report.geometric_mean([2.0, 8.0, math.nan]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("options", "rows", "written"),
    [
        (["--quick"], ROWS[:1], "out/bench/cpu.csv"),
        ([], ROWS[:1], "results/cpu.csv"),
        ([], [Row("cpu", "all", "tetris", status="skipped: needs a GPU")], None),
    ],
)
def test_quick_and_skipped_runs_leave_the_results_alone(tmp_path, monkeypatch, capsys, options, rows, written) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "results_folder", lambda device: tmp_path / "results")
    monkeypatch.setattr("tetris.bench.cpu_bench.run", lambda args: rows)
    assert bench.main(["cpu", "--device", "cpu", *options]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.csv")] == ([written] if written else [])
    assert written or "nothing is written" in capsys.readouterr().out


def test_vgg16_cases_match_the_network() -> None:
    names = [case.name for case in cases.VGG16_CONVS]
    assert len(names) == 13 and names[0] == "conv1_1" and names[-1] == "conv5_3"
    flop = sum(case.at(1).flop() for case in cases.VGG16_CONVS) + sum(c.at(1).flop() for c in cases.VGG16_LINEARS)
    assert flop == pytest.approx(2 * 15.47e9, rel=0.01)  # VGG16 is known for 15.5 G multiply-adds
    weights = sum(c.c_in * c.c_out * 9 for c in cases.VGG16_CONVS)
    weights += sum(c.in_features * c.out_features for c in cases.VGG16_LINEARS)
    assert weights == 138_344_128
    assert cases.VGG16_MODULES["conv5_3"] == "features.28" and cases.VGG16_MODULES["fc8"] == "classifier.6"


def test_strided_case_counts_its_output() -> None:
    case = cases.ConvCase("s", 8, 16, 14, 14, stride=2, batch=1)
    assert case.out_size == (7, 7)
    assert case.flop(0.5) == 2 * 49 * 8 * 16 * 9 * 0.5
    assert case.bytes() == 2 * (14 * 14 * 8 + 49 * 16 + 8 * 16 * 9)


def test_random_layout_keeps_what_is_asked() -> None:
    layout = cases.random_layout((130, 96), (32, 16), 0.27)
    assert layout.grid == (5, 6) and layout.n_blocks == 8
    assert torch.equal(layout.indices, cases.random_layout((130, 96), (32, 16), 0.27).indices)
    assert not torch.equal(layout.to_mask(), cases.random_layout((130, 96), (32, 16), 0.27, seed=1).to_mask())


def test_reordered_layout_is_less_even_than_a_random_one() -> None:
    pytest.importorskip("tetris.reordering")
    reordered = cases.reordered_layout((256, 256), (32, 32), 0.25)
    assert reordered.n_blocks == 16
    random = cases.random_layout((256, 256), (32, 32), 0.25)
    assert random.n_blocks == 16 and reordered.indptr.diff().max() > random.indptr.diff().max()
