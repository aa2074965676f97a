"""What the compiler makes of the search kernels at VGG16's sizes; prints JSON. Run where no interpreter is active."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from tests.support.compiler import compiling


def launch_all() -> None:
    """Every kernel of the search on empty operands of real sizes: fc6 and a 512-channel layer in 32x32 blocks."""
    from tetris.kernels.cycle_cancel import cancel_cycles
    from tetris.kernels.group_sums import group_sums
    from tetris.kernels.hard_mask import hard_mask
    from tetris.kernels.pair_split import play_tournament
    from tetris.kernels.soft_mask import soft_mask
    from tetris.kernels.swap_search import default_swap_search_config, swap_search

    for dim, n in ((0, 512), (1, 25088)):
        group_sums(torch.zeros(512, 25088), torch.arange(n), 32, dim=dim, processors=132)
    for n, groups in ((25088, 784), (512, 16)):
        values, order = torch.zeros(n, groups), torch.arange(n)
        epsilon = torch.zeros(())
        swap_search(values, order, 32, epsilon, config=default_swap_search_config(groups, 132))
        cancel_cycles(values, order, 32, epsilon.double(), processors=132)
        offsets, players = torch.arange(0, n + 32, 32), torch.arange(groups)
        play_tournament(values, order, offsets, players, 0, 9, epsilon, capacity=32, processors=132)
    hard_mask(torch.zeros(128, 784), 4000)
    for shape in ((128, 784), (16, 16)):
        soft_mask(torch.zeros(shape), torch.zeros(shape), 40, torch.zeros(1), 1.4, processors=132)


if __name__ == "__main__":
    with compiling(int(sys.argv[1])) as compiled:
        launch_all()
    print(json.dumps([dataclasses.asdict(kernel) for kernel in compiled]))
