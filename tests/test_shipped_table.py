"""The tables that ship with the package: readable, made from the committed rows, nothing that a kernel refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fake_gpu import H200
from tetris.autotune.space import is_valid
from tetris.bench.conv_cases import CASES as CONVS
from tetris.bench.linear_cases import CASES as LINEARS
from tetris.bench.readme import RESULTS
from tetris.bench.rows import Row, read_csv
from tetris.bench.shipped_table import entries, make_table
from tetris.kernels.configs import Conv2dConfig, DeviceInfo
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


def test_the_benches_layers_run_their_choice() -> None:
    rows = [*read_csv(RESULTS / "h200" / "conv.csv"), *read_csv(RESULTS / "h200" / "linear.csv")]
    shipped = {entry.key: entry for entry in read_entries(TABLES / "h200.json")}
    for entry in entries([*CONVS, *LINEARS], rows):
        match = shipped_choice(entry.problem, machine(entry))
        assert match is not None and match.distance == 0 and match.entry == shipped[entry.key]


@pytest.mark.parametrize(("tuned_us", "wins"), [(90.0, True), (98.5, False), (101.0, False)])
def test_a_choice_must_gain_more_than_the_spread(tuned_us: float, wins: bool) -> None:
    case = next(case for case in CONVS if case.layout == "reordered")
    default, other = Conv2dConfig(), Conv2dConfig(num_warps=8)
    rows = [
        Row("conv", case.name, provider, us, device="GPU", versions="torch 2.11.0, triton 3.6.0, cudnn 9", extra=extra)
        for provider, us, extra in (
            ("tetris", 100.0, {"kept": 0.25, "note": default.to_key()}),
            ("tetris tuned", tuned_us, {"kept": 0.25, "note": other.to_key()}),
        )
    ]
    found = list(entries([case], rows))
    assert len(found) == wins and list(entries([case], rows[:1])) == [], "both times are needed"
    for entry in found:
        assert (entry.config, entry.time_us, entry.default_us) == (other, tuned_us, 100)
        assert entry.triton == "3.6.0" and entry.problem.n_blocks == 16
