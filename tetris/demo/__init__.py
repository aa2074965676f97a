"""``tetris demo``: the paper's LeNet experiment, end to end, on real digits, in a minute or two.

datasets (what is learnt) -> training (the loop) -> experiment (the grid of pruned networks) -> pictures -> report.
"""
