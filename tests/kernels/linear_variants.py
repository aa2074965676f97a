"""Compile-time variants of the linear kernels and the random problems that each of them can run.

A variant is what the compiler sees: kernel, tiles, block, dtype and epilogue. Tokens, features, layouts and schedules
are run-time values.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch

from tests.support.fake_gpu import H200
from tests.support.moats import nan_outputs
from tests.support.operands import LinearCase, linear_operands, linear_problem
from tetris import reference
from tetris.kernels.configs import LinearConfig, LinearProblem, default_linear_config
from tetris.kernels.few_tokens import decode_config, split_config, vector_configs
from tetris.kernels.hopper.narrow_linear_schedule import TILE_OUT
from tetris.kernels.linear_paths import linear_launcher, linear_schedule
from tetris.tolerances import relative_error

MOST_TOKENS = {"vector": 1, "decode": 16, "split": 300, "portable": 300, "hopper": 700, "narrow": 700}
PERMUTING = ("vector", "decode", "split", "portable")
"""Kernels that gather their inputs and scatter their outputs."""


@dataclass(frozen=True)
class LinearVariant:
    """What one compilation fixes; ``extras`` as in :class:`LinearCase`."""

    config: LinearConfig
    block: tuple[int, int]
    dtype: str = "float16"
    activation: str = "none"
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        block, config = "x".join(map(str, self.block)), self.config
        tile = f"t{config.tile_tokens}o{config.tile_out}k{config.tile_k}s{config.num_stages}"
        return "-".join([config.kernel, block, tile, self.dtype, self.activation, *self.extras])

    def problem(self, generator: random.Random) -> LinearCase:
        """A random problem of this variant: ragged features, odd numbers of tokens."""
        return LinearCase(
            out_features=8 * generator.randint(1, 90),
            in_features=8 * generator.randint(1, 160),
            block=self.block,
            tokens=(generator.randint(1, MOST_TOKENS[self.config.kernel]),),
            kept=generator.choice((0.05, 0.3, 0.6, 1.0)),
            activation=self.activation,
            extras=self.extras,
        )

    def error(self, case: LinearCase, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> float:
        """The relative error on NaN-moated operands and a NaN-filled, moated output; few programs cut long rows."""
        operands = linear_operands(case, getattr(torch, self.dtype), device, seed)
        problem = linear_problem(case, operands)
        layout = (operands["indptr"], operands["indices"])
        schedule = linear_schedule(problem, self.config, *layout, random.Random(seed).choice((7, 132)))
        options = {} if schedule is None else {"schedule": schedule.tensors}
        with nan_outputs(monkeypatch):
            y = linear_launcher(self.config.kernel)(**operands, config=self.config, **options)
        return relative_error(y, reference.block_sparse_linear(**operands))


def _typical(block: tuple[int, int], tokens: int) -> LinearProblem:
    """A layer whose configs the variants take."""
    return LinearProblem(tokens, 1024, 1024, block, "float16", 1024 * 1024 // (2 * block[0] * block[1]))


def _kernels() -> list[tuple[LinearConfig, tuple[int, int]]]:
    """Every kernel with its tiles and blocks."""
    found: list[tuple[LinearConfig, tuple[int, int]]] = []
    for block in ((64, 64), (64, 32), (64, 16), (32, 32), (128, 64), (128, 32), (128, 16), (128, 128)):
        found += [(LinearConfig(kernel="hopper", tile_tokens=tile), block) for tile in (128, 256)]
    for block in ((32, 32), (32, 64), (64, 16), (64, 32), (128, 16), (128, 32)):
        found += [(LinearConfig(kernel="narrow", tile_out=tile), block) for tile in TILE_OUT]
    for block in ((64, 64), (32, 32), (64, 16), (128, 64)):
        found += [(split_config(_typical(block, 128), H200, tile), block) for tile in (16, 64, 128)]
        found += [(config, block) for config in vector_configs(_typical(block, 1))]
        found += [(decode_config(_typical(block, 16), H200), block)]
        found += [(default_linear_config(_typical(block, tokens), H200), block) for tokens in (16, 128)]
    return found


def _variants() -> tuple[LinearVariant, ...]:
    """Every kernel once; dtypes, activations and epilogues take turns."""
    dtypes, activations = cycle(("float16", "bfloat16")), cycle(("none", "relu", "silu", "gelu", "relu6"))
    fused = cycle(((), ("bias",), ("bias", "residual"), ("residual",)))
    moved = cycle(((), ("input",), ("output",), ("input", "output"), ()))
    found = []
    for config, block in dict.fromkeys(_kernels()):
        variant = LinearVariant(config, block, next(dtypes), next(activations), next(fused))
        more = next(moved) if config.kernel in PERMUTING else ()
        found.append(replace(variant, extras=variant.extras + more))
    return tuple(found)


VARIANTS = _variants()
