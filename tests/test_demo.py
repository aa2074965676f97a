"""The demo end to end on a small grid: results that make sense, files that hold them, resuming, and its arithmetic."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tetris.bench.rows import read_csv
from tetris.demo import experiment, report
from tetris.demo.datasets import digits
from tetris.demo.experiment import Result, ResultStore, Settings, Variant, multiply_adds, run_grid
from tetris.demo.pictures import accuracy_picture, layer_picture, shrink, to_png
from tetris.demo.run import RESUME_FOLDER, Outcome, run_demo
from tetris.demo.training import Schedule
from tetris.errors import FileFormatError, ShapeError, TetrisError
from tetris.models import LeNet
from tetris.reordering import reorder

SMALL = Settings(
    blocks=(16,),
    sparsities=(0.9,),
    methods=("none", "paper"),
    training=Schedule(epochs=3, learning_rate=0.03, batch_size=16),
    fine_tuning=Schedule(epochs=1, learning_rate=0.01, batch_size=32),
    timed_repeats=3,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, str]:
    """One run of the small grid, and what it printed on an 80-column terminal."""
    text = StringIO()
    out = tmp_path_factory.mktemp("demo")
    found = run_demo(out, SMALL, device="cpu", console=Console(file=text, width=80, force_terminal=False))
    return found, text.getvalue()


def test_results_make_sense(outcome: tuple[Outcome, str]) -> None:
    by_method = {result.variant.method: result for result in outcome[0].results}
    assert list(by_method) == ["element", "none", "paper"]
    assert outcome[0].summary.dense_accuracy > 0.9
    assert by_method["none"].retained < by_method["paper"].retained < by_method["element"].retained
    for method, result in by_method.items():
        assert result.pruned == pytest.approx(0.9, abs=0.03)
        assert result.accuracy_after > 0.5
        assert result.ideal > 1
        assert math.isnan(result.speedup) == (method == "element"), "only blocks are timed"
        assert method == "element" or (result.dense_us > 0 and result.error < 1e-4)


def test_the_table_fits_a_terminal(outcome: tuple[Outcome, str]) -> None:
    text = outcome[1]
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = [line for line in text.splitlines() if line.lstrip().startswith(("16x16", "1x1"))]
    assert [line.split()[2] for line in lines] == ["element", "blocks", "TETRIS"]
    assert "…" not in text


def test_files_hold_the_results(outcome: tuple[Outcome, str]) -> None:
    found = outcome[0]
    folder = found.report_path.parent
    assert sorted(p.name for p in folder.iterdir()) == ["accuracy.png", "demo.csv", "layer.png", "report.html"]
    rows = read_csv(folder / "demo.csv")
    assert [row.provider for row in rows] == ["element", "none", "paper"]
    assert rows[2].extra["accuracy_after"] == pytest.approx(found.results[2].accuracy_after, rel=1e-5)
    assert rows[2].speedup == pytest.approx(found.results[2].speedup, rel=1e-4)


def test_the_page_is_self_contained_and_complete(outcome: tuple[Outcome, str]) -> None:
    found = outcome[0]
    page = found.report_path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert page.count('src="data:image/png;base64,') == 4
    assert page.count("<tr") == 1 + len(found.results)
    for result in found.results:
        for text in report.cells(result, found.summary.dense_accuracy):
            assert f"<td>{text}</td>" in page


def test_a_finished_grid_is_not_run_again(
    tmp_path: Path, outcome: tuple[Outcome, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted grid goes on at the variant that it was at; other settings start over."""
    results = {result.variant.key: result for result in outcome[0].results}
    data, model = digits(), LeNet()
    ran: list[str] = []

    def fake(dense: object, data: object, variant: Variant, *rest: object) -> Result:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(variant.key)
        return results[variant.key]

    monkeypatch.setattr(experiment, "run_variant", fake)
    with pytest.raises(KeyboardInterrupt):
        list(run_grid(model, data, SMALL, tmp_path))
    ran.clear()
    assert len(list(run_grid(model, data, SMALL, tmp_path))) == 3
    assert ran == ["paper-16-0.9"]
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        list(run_grid(model, data, replace(SMALL, seed=1), tmp_path))
    assert len(ran) == 2


def test_an_interrupted_demo_keeps_what_it_needs_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> Result:
        raise KeyboardInterrupt

    settings = replace(SMALL, training=Schedule(epochs=1, learning_rate=0.01, batch_size=64))
    monkeypatch.setattr(experiment, "run_variant", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, settings, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [RESUME_FOLDER], "no half-written results"
    assert [path.name for path in (tmp_path / RESUME_FOLDER).glob("*/*")] == ["dense.pt"]
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, replace(settings, seed=7), device="cpu")
    assert len(list((tmp_path / RESUME_FOLDER).glob("*/dense.pt"))) == 2, "another seed does not meet its checkpoint"


def test_a_corrupt_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"fingerprint": "x", "results": [{}]}')
    with pytest.raises(FileFormatError, match=r"corrupt .* delete it"):
        ResultStore(tmp_path / "results.json", "x")


def test_multiply_adds_of_lenet() -> None:
    counts = multiply_adds(LeNet(), torch.zeros(1, 1, 28, 28))
    assert counts == {"conv1": 500 * 24 * 24, "conv2": 25000 * 8 * 8, "fc1": 400_000, "fc2": 5000}


def test_settings_by_dataset() -> None:
    assert len(Settings().variants()) == 4 * (1 + 3 * 3)
    assert len({variant.key for variant in Settings().variants()}) == 40
    assert Settings.for_dataset("mnist").training.epochs < Settings.for_dataset("digits").training.epochs
    quick = Settings.for_dataset("digits", seed=4, quick=True, methods=("annealed",))
    assert len(quick.variants()) == 4 and quick.seed == 4
    with pytest.raises(TetrisError, match="got magic"):
        Settings.for_dataset("digits", methods=("magic",))


def test_the_headline_is_honest_about_losses(outcome: tuple[Outcome, str]) -> None:
    summary = outcome[0].summary
    lossy = Result(Variant("paper", 8, 0.9), 0.2, 0.9, 0.2, 0.1, summary.dense_accuracy - 0.2, 300.0, 100.0)
    assert "no converted variant" in report.headline([lossy], summary)
    slower = replace(lossy, accuracy_after=summary.dense_accuracy, fast_us=600.0)
    assert "0.50x" in report.headline([lossy, slower], summary)


def test_pictures_are_png_files_of_what_they_show(outcome: tuple[Outcome, str]) -> None:
    weight = torch.randn(96, 40, 3, 3)
    found = reorder(weight, block=16, sparsity=0.75, method="sort")
    figure = layer_picture(weight, found, "conv")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["original", "channels reordered", "16x16 blocks, 75% pruned"]
    shown = figure.axes[2].images[0].get_array()
    kept = found.block_mask.repeat_interleave(16, 0)[:96].repeat_interleave(16, 1)[:, :40]  # type: ignore[union-attr]
    drawn = shown.data != 0
    assert sorted(map(tuple, drawn.sum(1, keepdims=True))) == sorted(map(tuple, kept.sum(1, keepdim=True).tolist()))
    assert (np.diff(drawn[:, :16].sum(1)) <= 0).all(), "block rows are drawn fullest first"
    assert f"{found.retained:.1%}" in figure.get_suptitle()
    assert to_png(figure, dpi=40)[:4] == b"\x89PNG"
    curves = accuracy_picture(outcome[0].results, 0.98, "digits")
    assert [axes.get_title() for axes in curves.axes] == ["16x16 blocks", ""]
    assert len(curves.axes[1].lines) == 4, "dense, element-wise, blocks, TETRIS"


def test_pictures_of_large_matrices_are_averaged_and_others_refused() -> None:
    assert shrink(torch.ones(1000, 30), 100).shape == (100, 30)
    weight = torch.randn(8, 8)
    with pytest.raises(ShapeError, match="without blocks"):
        layer_picture(weight, reorder(weight, block=2, method="none", structure="element"), "fc")
