"""The end-to-end rule on recorded measurements: no network, no device, no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetris.autotune.never_slower import gain_us, never_slower
from tetris.errors import FileFormatError
from tetris.plans import GROUPED, SEPARATE, SHARED, Candidate, EndToEnd, LayerPlan, ModelPlan

BLOCK = (64, 32)


def layer(name: str, sparse_us: float, block: tuple[int, int] | None = BLOCK) -> LayerPlan:
    """100 us dense, ``sparse_us`` in blocks."""
    candidates = (Candidate(None, 0.0, 1.0, 1.0, 100.0), Candidate(BLOCK, 0.75, 0.25, 0.6, sparse_us))
    return LayerPlan(name, "conv2d", (128, 64, 3, 3), block, 0.75 if block else 0.0, 1.0, (), candidates, "fast")


PLAN = ModelPlan((layer("a", 30), layer("b", 80), layer("c", 50), layer("d", 90), layer("e", 200, None)))


class Recorded:
    """A network that takes 1000 us dense and, converted, what was recorded for its set of sparse layers."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.asked = times, []

    def __call__(self, plan: ModelPlan) -> EndToEnd:
        self.asked.append("".join(plan.blocks))
        return EndToEnd("compile", 1000.0, self.times[self.asked[-1]])


def test_a_faster_network_keeps_its_choices() -> None:
    measure = Recorded({"abcd": 400.0})
    found = never_slower(PLAN, measure)
    assert found.layers == PLAN.layers and measure.asked == ["abcd"]
    assert found.end_to_end == EndToEnd("compile", 1000.0, 400.0) and found.end_to_end.speedup == 2.5
    assert "whole network (compile): dense 1000.0 -> converted 400.0 us, 2.50x" in str(found)


def test_noise_is_no_reason_to_give_up() -> None:
    assert never_slower(PLAN, Recorded({"abcd": 1009.0})).blocks == PLAN.blocks
    assert never_slower(PLAN, Recorded({"abcd": 1011.0, "ac": 900.0})).blocks == {"a": BLOCK, "c": BLOCK}


def test_the_layers_that_gain_least_go_first() -> None:
    measure = Recorded({"abcd": 1200.0, "ac": 1050.0, "a": 990.0})
    found = never_slower(PLAN, measure)
    assert measure.asked == ["abcd", "ac", "a"] and found.blocks == {"a": BLOCK}
    assert found.end_to_end is not None and found.end_to_end.note.startswith("d, b, c dense")
    assert found["d"].reason.startswith("dense: the network as a whole ran at 0.83x")
    assert found["c"].reason.startswith("dense: the network as a whole ran at 0.95x")
    assert ModelPlan.from_json(found.to_json()) == found


def test_all_dense_where_nothing_helps() -> None:
    found = never_slower(PLAN, Recorded({"abcd": 1200.0, "ac": 1100.0, "a": 1050.0}))
    assert found.blocks == {} and found.end_to_end is not None
    assert found.end_to_end.speedup == 1.0 and "every layer dense" in str(found)


def test_a_dense_plan_is_not_measured() -> None:
    dense = ModelPlan((layer("a", 200, None),))
    assert never_slower(dense, Recorded({})) is dense


def test_movements_at_run_time_must_not_show_in_the_whole_network() -> None:
    own = replace(PLAN["a"], input_order=SEPARATE, output_order=GROUPED)
    plan = PLAN.with_layer(own)

    def measured(moving_us: float, still_us: float) -> tuple[ModelPlan, list[str]]:
        asked = []

        def measure(plan: ModelPlan) -> EndToEnd:
            asked.append(plan["a"].input_order)
            return EndToEnd("compile", 1000.0, moving_us if asked[-1] == SEPARATE else still_us)

        return never_slower(plan, measure), asked

    found, asked = measured(2448.0 / 7.0, 2261.0 / 7.0)
    assert asked == [SEPARATE, SHARED] and found["a"].input_order == SHARED
    assert found["a"].output_order == GROUPED and found["a"].reason.endswith("the network as a whole is slower with it")
    assert found.end_to_end == EndToEnd("compile", 1000.0, 2261.0 / 7.0)
    kept, asked = measured(402.0, 400.0)
    assert kept.layers == plan.layers and kept.end_to_end.converted_us == 402.0 and len(asked) == 2


def test_choices_by_hand_go_last() -> None:
    by_hand = LayerPlan("h", "linear", (64, 64), BLOCK, 0.5)
    assert gain_us(by_hand) == float("inf") and gain_us(PLAN["a"]) == 70.0
    found = never_slower(ModelPlan((by_hand, layer("a", 30))), Recorded({"ha": 1200.0, "h": 900.0}))
    assert list(found.blocks) == ["h"]


def test_an_incomplete_measurement_is_refused() -> None:
    text = never_slower(PLAN, Recorded({"abcd": 400.0})).to_json().replace('"how": "compile",', "")
    with pytest.raises(FileFormatError, match=r"end_to_end: the fields \['how'\] are missing"):
        ModelPlan.from_json(text)
