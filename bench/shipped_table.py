"""``python -m tetris.bench.shipped_table``: make the package's table of tuned choices from the committed tuning rows.

A choice ships where it beat the analytic default by more than the medians' spread in the layout from reordering that it
was searched in, and was not slower in a random layout of the same size: a table knows sizes, not layouts. A layer of
the suites that would take the choice of such a neighbour, and was measured to be as fast without, has its default in
the table, too. ``shipped.csv`` says what that makes of the suites, against the full search.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tetris.bench.readme import RESULTS
from tetris.bench.rows import OK, Row, read_csv, write_csv
from tetris.bench.tuning_cases import FULL, SUITES, TuningCase
from tetris.kernels.configs import Conv2dConfig, DeviceInfo, LinearConfig, LinearProblem
from tetris.kernels.few_tokens import depends_on_layout
from tetris.tuned_choices import NEAR, TABLES, Config, Entry, nearest, write_entries

GAIN = 0.02
"""Of the default's time; less is within the spread of the medians."""
SM_COUNT = 132
CASES = [case for suite in FULL for case in SUITES[suite]]


def entries(cases: Iterable[TuningCase], rows: Iterable[Row]) -> list[Entry]:
    """The choices that are worth shipping, and the defaults that they would displace."""
    timed = {(row.case, row.provider): row for row in rows if row.status == OK}
    winners, others = [], []
    for case in cases:
        default, tuned = timed.get((case.name, "analytic")), timed.get((case.name, "tuned"))
        if default is None or tuned is None:
            continue
        if ships(case, default, tuned):
            winners.append(made(case, tuned, default))
        else:
            others.append(made(case, default, default))
    return winners + [entry for entry in others if displaced(entry, winners)]


def wins(default: Row, tuned: Row) -> bool:
    """Whether a choice is faster in its own layout, and no slower in a random one."""
    there = [float(row.extra.get("random_us", "nan")) for row in (tuned, default)]
    return tuned.median_us <= (1 - GAIN) * default.median_us and there[0] <= there[1]


def ships(case: TuningCase, default: Row, tuned: Row) -> bool:
    """Whether the table takes a choice."""
    return wins(default, tuned) and not looks_at_the_layout(made(case, tuned, default), made(case, default, default))


def looks_at_the_layout(entry: Entry, default: Entry) -> bool:
    """Whether a fresh layer decides itself, because the layout decides; of 1x1 convolutions only between tiles."""
    if isinstance(entry.problem, LinearProblem) and isinstance(entry.config, LinearConfig):
        return depends_on_layout(entry.problem, entry.config, 0)
    return entry.config.kernel == default.config.kernel == "hopper_linear"


def displaced(entry: Entry, winners: list[Entry]) -> bool:
    """Whether a default's problem would take the different choice of a neighbour."""
    device = DeviceInfo(entry.device, entry.capability, SM_COUNT, entry.triton)
    found = nearest(winners, entry.problem, device, entry.max_pool, NEAR)
    return found is not None and found.config != entry.config


def made(case: TuningCase, chosen: Row, default: Row) -> Entry:
    """The entry of a row."""
    kind: type[Config] = Conv2dConfig if case.is_convolution else LinearConfig
    triton = chosen.versions.split("triton ")[1].split(",")[0]
    problem, config = case.problem(int(chosen.extra["n_blocks"])), kind.from_key(str(chosen.extra["config"]))
    return Entry(
        chosen.device, (9, 0), triton, problem, config, chosen.median_us, default.median_us,
        int(chosen.extra["tried"]), case.max_pool,
    )  # fmt: skip


def make_table(results: Path, path: Path) -> int:
    """Write the table of a folder of CSV files; returns how many choices it has."""
    found = entries(CASES, read_csv(results / "tuning.csv"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_entries(path, found)
    return len(found)


def network_rows(cases: Iterable[TuningCase], rows: Iterable[Row]) -> list[Row]:
    """A row a network: all its layers with analytic choices, with the table's, and with the full search's, in us.

    ``median_us`` is that with the table; ``fraction``, ``analytic_fraction``: the full search's time / these.
    """
    timed = {(row.case, row.provider): row for row in rows if row.status == OK}
    found: dict[str, list[TuningCase]] = {}
    for case in cases:
        if (case.name, "analytic") in timed and (case.name, "tuned") in timed:
            found.setdefault(case.suite, []).append(case)
    made_rows = []
    for network, layers in found.items():
        pairs = [(case, timed[case.name, "analytic"], timed[case.name, "tuned"]) for case in layers]
        shipped = [ships(case, a, t) for case, a, t in pairs]
        best_us = sum(case.layer.count * tuned.median_us for case, _, tuned in pairs)
        analytic_us = sum(case.layer.count * analytic.median_us for case, analytic, _ in pairs)
        us = sum(case.layer.count * (t if ship else a).median_us for (case, a, t), ship in zip(pairs, shipped))
        extra = {"layers": len(layers), "shipped": sum(shipped), "analytic_us": analytic_us, "best_us": best_us}
        extra |= {"analytic_fraction": best_us / analytic_us, "fraction": best_us / us}
        first = pairs[0][2]
        made_rows.append(
            Row("shipped", network, "table", us, device=first.device, versions=first.versions, extra=extra)
        )
    return made_rows


def main() -> None:
    """Make the H200's table and say what it makes of the suites."""
    folder, table = RESULTS / "h200", TABLES / "h200.json"
    print(make_table(folder, table), "choices written to", table)
    write_csv(folder / "shipped.csv", network_rows(CASES, read_csv(folder / "tuning.csv")))


if __name__ == "__main__":
    main()
