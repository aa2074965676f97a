"""A process that tunes a model of CPU layers, which ignore their configurations, as if they were on an H200.

    python -m tests.support.tune_on_cpu FOLDER [SECONDS]       (or under torchrun)

FOLDER holds the store; every search takes SECONDS longer. Prints a line a search, and the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import tetris
from tests.support.fake_gpu import H200
from tetris.autotune import tune_problems, tuner
from tetris.autotune.store import TuningStore
from tetris.autotune.team import Team

WIDTHS = (32, 48, 64, 80, 96, 112)


def converted() -> tuple[nn.Module, torch.Tensor]:
    """Five layers, five problems."""
    torch.manual_seed(0)
    layers = [nn.Linear(before, after) for before, after in pairwise(WIDTHS)]
    model, x = nn.Sequential(*layers), torch.randn(8, WIDTHS[0])
    return tetris.convert(tetris.prune(model, 0.5, block=16, method="none"), example_inputs=x), x


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    find, searched = tune_problems.find, []

    def find_slowly(outcome, *arguments):
        time.sleep(seconds)
        find(outcome, *arguments)
        searched.append(outcome.wanted.name)
        sys.stdout.write(f"searched {outcome.wanted.name}\n")
        sys.stdout.flush()

    tune_problems.find = find_slowly
    tuner.require_gpu = lambda devices: None
    tuner.device_info = lambda device: H200
    torch.set_num_threads(1)
    fast, x = converted()
    team = replace(Team.of_torchrun(), lost_seconds=5.0)
    store = TuningStore(folder, tables=folder / "none")
    shown: list[int] = []
    tuning = tuner.tune_model(
        fast, x, store=store, budget=3, team=team, workers=1, progress=lambda name, done, total: shown.append(done)
    )
    configs = {name: layer.config for name, layer in tuner.sparse_layers(fast).items()}
    result = {
        "rank": team.rank,
        "searched": searched,
        "entries": len(tuning.entries),
        "reused": len(tuning.reused),
        "configs": configs,
        "stored": len(store.mine),
        "shown": shown[-1:],
    }
    sys.stdout.write(f"result {json.dumps(result)}\n")


if __name__ == "__main__":
    main()
