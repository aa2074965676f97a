"""Plans: what they say about their layers, and that no edited, broken or foreign file is mistaken for one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tetris.bench.readme import RESULTS
from tetris.errors import FileFormatError, TetrisError
from tetris.plans import Candidate, LayerPlan, ModelPlan


def layer(name: str = "conv", block: tuple[int, int] | None = (64, 32), importance: float = 10.0) -> LayerPlan:
    candidates = (
        Candidate(None, 0.0, 1.0, 1.0, 100.0),
        Candidate((32, 32), 0.75, 0.25, 0.6, 80.0),
        Candidate((64, 32), 0.75, 0.25, 0.5, 40.0, config='{"tile":1}'),
    )
    return LayerPlan(
        name, "conv2d", (128, 64, 3, 3), block, 0.75 if block else 0.0, importance, (8, 64, 28, 28), candidates, "fast"
    )


PLAN = ModelPlan((layer("a"), layer("b", None, 30.0)), device="H200", versions="torch 2", dtype="float16", budget="")


def test_layer_reads_its_choice_from_the_measurements() -> None:
    first, second = PLAN
    assert first.speedup == 2.5 and first.retained == 0.5 and first.kept_fraction == 0.25
    assert first.config == '{"tile":1}'
    assert second.speedup == 1.0 and second.retained == 1.0 and second.chosen is second.dense


def test_model_sums_times_and_weighs_losses_by_importance() -> None:
    assert PLAN.dense_us == 200.0 and PLAN.planned_us == 140.0
    assert PLAN.speedup == pytest.approx(200 / 140)
    assert PLAN.retained == pytest.approx((10 * 0.5 + 30 * 1.0) / 40)
    assert PLAN.blocks == {"a": (64, 32)} and PLAN.sparsities == {"a": 0.75}


def test_json_round_trip_is_exact(tmp_path) -> None:
    path = PLAN.save(tmp_path / "deep" / "plan.json")
    assert ModelPlan.load(path) == PLAN
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_a_plan_can_be_edited_and_written_by_hand() -> None:
    data = json.loads(PLAN.to_json())
    data["layers"][0]["block"] = 32
    edited = ModelPlan.from_json(json.dumps(data))
    assert edited["a"].block == (32, 32) and edited["a"].speedup == 1.25
    by_hand = {"format": "tetris-plan", "version": 1, "layers": [{"name": "x", "kind": "linear", "shape": [8, 4]}]}
    short = ModelPlan.from_json(json.dumps(by_hand))
    assert short["x"].block is None and math.isnan(short["x"].speedup) and math.isnan(short.speedup)
    assert "x" in str(short)


def test_with_choice_keeps_the_measurements() -> None:
    changed = PLAN.with_layer(PLAN["a"].with_choice((32, 32), 0.75))
    assert changed["a"].speedup == 1.25 and changed["a"].reason == "set by hand" and PLAN["a"].speedup == 2.5
    never_measured = PLAN["a"].with_choice((16, 16), 0.5)
    assert math.isnan(never_measured.speedup) and never_measured.kept_fraction == 0.5
    assert PLAN["a"].with_choice(None, 0.75).sparsity == 0.0


def test_table_marks_the_choice_of_every_layer() -> None:
    lines = str(PLAN).splitlines()
    row_a, row_b = (next(line for line in lines if line.startswith(name + " ")) for name in "ab")
    assert "2.50 *" in row_a and "1.25" in row_a and "64x32" in row_a and "fast" in row_a
    assert "100.0 *" in row_b and "dense" in row_b
    assert any("1.43x" in line for line in lines) and "H200" in lines[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format="other"), "another kind"),
        (lambda d: d.update(version=99), "99"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d.update(layers={}), "list"),
        (lambda d: d["layers"][0].update(kind="lstm"), "lstm"),
        (lambda d: d["layers"][0].update(block=[64]), "out, in"),
        (lambda d: d["layers"][0].update(block=[0, 4]), "sizes"),
        (lambda d: d["layers"][0].update(sparsity=1.0), "sparsity"),
        (lambda d: d["layers"][0].update(sparsity="much"), "much"),
        (lambda d: d["layers"][0].pop("shape"), "shape"),
        (lambda d: d["layers"][0]["candidates"][1].pop("time_us"), "time_us"),
        (lambda d: d["layers"].append(3), "object"),
    ],
)
def test_wrong_content_is_named(change, says) -> None:
    data = json.loads(PLAN.to_json())
    change(data)
    with pytest.raises(FileFormatError, match=says):
        ModelPlan.from_json(json.dumps(data))


def test_missing_and_corrupt_files_are_named(tmp_path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        ModelPlan.load(tmp_path / "none.json")
    half = tmp_path / "half.json"
    half.write_text(PLAN.to_json()[:200])
    with pytest.raises(FileFormatError, match=r"half\.json"):
        ModelPlan.load(half)
    half.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="no text"):
        ModelPlan.load(half)


def test_unknown_layer_lists_the_known_ones() -> None:
    assert "a" in PLAN and "z" not in PLAN
    with pytest.raises(TetrisError, match="a, b"):
        PLAN["z"]


@pytest.mark.parametrize("path", sorted((RESULTS / "h200/plans").glob("*.json")), ids=lambda path: path.stem)
def test_committed_plans_load_and_move_nothing_at_run_time(path: Path) -> None:
    plan = ModelPlan.load(path)
    assert plan.end_to_end is not None and plan.end_to_end.speedup > 1 and len(plan.blocks) > 1
    assert all(layer == layer.without_movements() for layer in plan)
