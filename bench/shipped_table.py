"""``python -m tetris.bench.shipped_table``: make the package's table of tuned choices from committed rows.

Two sources: the convolution and the linear bench, whose "tetris tuned" is the fastest of a few configurations and whose
"tetris" is the default, timed in one run. Reordered layouts alone count: they are what the package makes. Where the
default is as fast as the choice nothing is shipped, because it can look at the layout, and a table cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tetris.bench import conv_cases, linear_cases
from tetris.bench.conv_measure import case_problem
from tetris.bench.readme import RESULTS
from tetris.bench.rows import OK, Row, read_csv
from tetris.kernels.configs import Conv2dConfig, LinearConfig, LinearProblem
from tetris.layout import grid_shape
from tetris.tuned_choices import TABLES, Config, Entry, Problem, write_entries

GAIN = 0.02
"""Of the default's time; less is within the spread of the benches' medians."""


Case = conv_cases.Case | linear_cases.Case


def problem_of(case: Case, kept: float) -> Problem:
    """The problem of a bench's case, of which ``kept`` of the blocks were stored."""
    if isinstance(case, conv_cases.Case):
        rows, columns = grid_shape((case.layer.c_out, case.layer.c_in), case.block)
        return case_problem(case, round(kept * rows * columns))
    layer = case.layer
    rows, columns = grid_shape((layer.out_features, layer.in_features), case.block)
    n_blocks = round(kept * rows * columns)
    return LinearProblem(layer.tokens, layer.in_features, layer.out_features, case.block, case.dtype, n_blocks)


def entries(cases: Iterable[Case], rows: Iterable[Row]) -> Iterator[Entry]:
    """The choices that beat the default; 16-bit only, because float32 depends on a setting of torch."""
    timed = {(row.case, row.provider): row for row in rows if row.status == OK and row.extra.get("note")}
    for case in cases:
        default, tuned = timed.get((case.name, "tetris")), timed.get((case.name, "tetris tuned"))
        if default is None or tuned is None or case.layout != "reordered" or case.dtype == "float32":
            continue
        if tuned.median_us > (1 - GAIN) * default.median_us or tuned.extra["note"] == default.extra["note"]:
            continue
        kind: type[Config] = Conv2dConfig if isinstance(case, conv_cases.Case) else LinearConfig
        triton = default.versions.split("triton ")[1].split(",")[0]
        problem = problem_of(case, float(default.extra["kept"]))
        config = kind.from_key(str(tuned.extra["note"]))
        yield Entry(default.device, (9, 0), triton, problem, config, tuned.median_us, default.median_us)


def make_table(results: Path, path: Path) -> int:
    """Write the table of a folder of CSV files; returns how many choices it has."""
    convs = entries(conv_cases.CASES, read_csv(results / "conv.csv"))
    linears = entries(linear_cases.CASES, read_csv(results / "linear.csv"))
    found = [*convs, *linears]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_entries(path, found)
    return len(found)


if __name__ == "__main__":
    print(make_table(RESULTS / "h200", TABLES / "h200.json"), "choices written to", TABLES / "h200.json")
