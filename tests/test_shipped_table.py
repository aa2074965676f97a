"""The tables that ship with the package: readable, made from the committed rows, nothing that a kernel refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_gpu import H200
from tetris.autotune.space import is_valid
from tetris.bench.readme import RESULTS
from tetris.bench.rows import Row, read_csv, write_csv
from tetris.bench.shipped_table import CASES, entries, make_table, network_rows
from tetris.kernels.configs import Conv2dConfig, DeviceInfo, LinearConfig
from tetris.tuned_choices import TABLES, Entry, read_entries, shipped_choice


def machine(entry: Entry) -> DeviceInfo:
    return DeviceInfo(entry.device, entry.capability, H200.sm_count, entry.triton)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.name)
def test_a_table_is_one_device_and_version_and_every_choice_is_valid(path: Path) -> None:
    found = read_entries(path)
    assert len({(entry.device, entry.triton) for entry in found}) == 1
    assert len({entry.key for entry in found}) == len(found) > 0
    assert not [e.key for e in found if not is_valid(e.problem, machine(e), e.config, e.max_pool)]
    assert not [e.key for e in found if e.time_us > e.default_us], "the default was among the candidates"
    assert all(Entry.from_json(json.loads(json.dumps(e.to_json())), "test") == e for e in found)


def test_the_h200_s_table_is_what_the_committed_rows_say(tmp_path: Path) -> None:
    made = tmp_path / "h200.json"
    assert make_table(RESULTS / "h200", made) >= 1
    assert made.read_text() == (TABLES / "h200.json").read_text(), "run python -m tetris.bench.shipped_table"


def test_the_suites_layers_run_their_choice() -> None:
    shipped = {entry.key: entry for entry in read_entries(TABLES / "h200.json")}
    for entry in entries(CASES, read_csv(RESULTS / "h200" / "tuning.csv")):
        match = shipped_choice(entry.problem, machine(entry), entry.max_pool)
        assert match is not None and match.distance == 0 and match.entry == shipped[entry.key]


def rows(case: str, tuned_us: float, random_us: tuple[float, float]) -> list[Row]:
    """A default of 100 us and a choice; times in a random layout of both."""
    default, other = Conv2dConfig(), Conv2dConfig(num_warps=8)
    return [
        Row(
            "tuning", case, provider, us, device="GPU", versions="torch 2.11.0, triton 3.6.0, cudnn 9",
            extra={"n_blocks": 16, "tried": 9, "config": config.to_key(), "random_us": there},
        )
        for provider, us, config, there in (
            ("analytic", 100.0, default, random_us[0]), ("tuned", tuned_us, other, random_us[1]),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tuned_us", "random_us", "ships"),
    [
        (90.0, (80.0, 75.0), True),
        (98.5, (80.0, 75.0), False),
        (101.0, (80.0, 75.0), False),
        (90.0, (80.0, 81.0), False),
        (90.0, (math.nan, 75.0), False),
    ],
)
def test_a_choice_must_gain_more_than_the_spread_and_lose_nothing_in_another_layout(
    tuned_us: float, random_us: tuple[float, float], ships: bool
) -> None:
    case = next(case for case in CASES if case.max_pool)
    given = rows(case.name, tuned_us, random_us)
    found = entries([case], given)
    assert len(found) == ships and entries([case], given[:1]) == [], "both times are needed"
    for entry in found:
        assert (entry.config, entry.time_us, entry.default_us) == (Conv2dConfig(num_warps=8), tuned_us, 100)
        assert entry.triton == "3.6.0" and entry.problem == case.problem(16) and entry.max_pool and entry.tried == 9


def test_a_neighbour_that_was_faster_without_keeps_its_default() -> None:
    """The deeper of two layers that differ in their inputs alone did not win: it must not take the other's choice."""
    first, second = (next(case for case in CASES if case.name == f"vgg16 b8 {name}") for name in ("conv3_1", "conv3_2"))
    given = [*rows(first.name, 90.0, (80.0, 75.0)), *rows(second.name, 99.0, (80.0, 75.0))]
    winner, kept = entries([first, second], given)
    assert winner.config == Conv2dConfig(num_warps=8) and kept.config == Conv2dConfig()
    assert kept.problem == second.problem(16) and kept.time_us == kept.default_us == 100
    far = next(case for case in CASES if case.name == "vgg16 b1 conv3_2")
    assert len(entries([first, far], [*given[:2], *rows(far.name, 99.0, (80.0, 75.0))])) == 1


def test_choices_that_a_layer_makes_by_its_layout_do_not_ship() -> None:
    case = next(case for case in CASES if not case.is_convolution)
    for kernel, ships in (("split", False), ("hopper", False), ("narrow", True)):
        default, tuned = rows(case.name, 90.0, (80.0, 75.0))
        choices = LinearConfig(), LinearConfig(kernel=kernel)
        given = [replace(r, extra=r.extra | {"config": c.to_key()}) for r, c in zip((default, tuned), choices)]
        assert len(entries([case], given)) == ships
    case = next(case for case in CASES if case.name == "resnet50 b128 1x1 1024-256@14")
    for kernel, ships in (("hopper", True), ("hopper_linear", False)):
        default, tuned = rows(case.name, 90.0, (80.0, 75.0))
        pointwise = [Conv2dConfig(kernel=kernel, tile_w=256), Conv2dConfig(kernel="hopper_linear", tile_w=128)]
        given = [replace(r, extra=r.extra | {"config": c.to_key()}) for r, c in zip((default, tuned), pointwise)]
        assert len(entries([case], given)) == ships, "the table names the kernel, the layout its tile"


def test_networks_are_compared_with_the_full_search() -> None:
    """Of two layers, once each, one choice of 90 us ships; the other, 95 us, loses in a random layout."""
    cases = [case for case in CASES if case.name in ("vgg16 b8 conv3_1", "vgg16 b8 conv4_3")]
    given = [*rows(cases[0].name, 90.0, (80.0, 75.0)), *rows(cases[1].name, 95.0, (80.0, 85.0))]
    (row,) = network_rows(cases, given)
    assert (row.case, row.median_us, row.extra["analytic_us"], row.extra["best_us"]) == ("vgg16 b8", 190, 200, 185)
    assert row.extra["fraction"] == 185 / 190 and row.extra["analytic_fraction"] == 185 / 200
    assert (row.extra["layers"], row.extra["shipped"]) == (2, 1)


def test_the_committed_comparison_is_that_of_the_committed_rows(tmp_path: Path) -> None:
    made = write_csv(tmp_path / "shipped.csv", network_rows(CASES, read_csv(RESULTS / "h200" / "tuning.csv")))
    assert made.read_text() == (RESULTS / "h200" / "shipped.csv").read_text(), (
        "run python -m tetris.bench.shipped_table"
    )
