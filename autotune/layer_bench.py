"""How one layer's configurations are timed, and when one counts as right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tetris.autotune.compile_job import first_line
from tetris.autotune.compile_server import prepare_to_launch
from tetris.autotune.problems import LayerInput, SparseLayer
from tetris.autotune.race import heat_us, race
from tetris.autotune.space import Config
from tetris.autotune.steps import Steps
from tetris.autotune.timer import Timing, graphed
from tetris.kernels.recording import unrecorded
from tetris.ops import dtype_name

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-3}
"""Largest ||y - y_first|| / ||y_first|| of a configuration that is taken; other summation orders stay far below."""


@dataclass
class LayerBench:
    """Times configurations of one layer; all must give what the first that ran gave: start with the default.

    On a GPU they run from CUDA graphs: a launch of a Gluon kernel takes Python longer than many a kernel runs. Kernels
    are called as they are: to register or to record the call costs time, and the graph holds the same launches.

    Attributes:
        failures: configurations that do not run or answer wrongly, with the reason.
        made: the layer in configurations whose launches were prepared earlier.
        steps: seconds of making the input, of loading and capturing, of the race and of the last measurement.
    """

    layer: SparseLayer
    x: LayerInput
    failures: dict[Config, str] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    made: Mapping[Config, SparseLayer] = field(default_factory=dict)
    reference: torch.Tensor | None = None
    _runs: dict[Config, Callable[[], object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with self.steps.timed("input"):
            self.images = self.x.random(self.x.device, channels_last=True)
        self._pool = torch.cuda.graph_pool_handle() if self.images.is_cuda else None

    def race(self, configs: Sequence[Config]) -> dict[Config, float]:
        """Microseconds of the configurations that run and are right; the slower, the less exact."""
        runs = self._prepared(configs)
        with self.steps.timed("race"):
            times = race(runs, self.x.device)
        return {config: times[config.to_key()] for config in configs if config.to_key() in times}

    def final(self, configs: Sequence[Config], repeats: int = 25) -> dict[Config, Timing]:
        """The last few, well timed."""
        runs = self._prepared(configs)
        with self.steps.timed("final"):
            times = heat_us(runs, self.x.device, repeats)
        return {config: times[config.to_key()] for config in configs if config.to_key() in times}

    def layer_with(self, config: Config) -> SparseLayer:
        """The layer with another configuration; its tensors are shared."""
        return self.made[config] if config in self.made else with_config(self.layer, config)

    @torch.no_grad()
    def _prepared(self, configs: Sequence[Config]) -> dict[str, Callable[[], object]]:
        with self.steps.timed("prepare"), self.steps.watching_the_compiler(), unrecorded():
            for config in configs:
                if config not in self._runs and config not in self.failures:
                    try:
                        self._prepare(config, self.layer_with(config))
                    except Exception as problem:  # whatever a compiler or a driver raises is a finding about the config
                        self.failures[config] = f"{type(problem).__name__}: {first_line(problem)}"
        return {config.to_key(): self._runs[config] for config in configs if config in self._runs}

    def _prepare(self, config: Config, layer: SparseLayer) -> None:
        """Run once, compare, and capture. What is captured does not know this bench, so that graphs end with it.

        In a cycle they would wait for the garbage collector, which may come while the next layer is being captured.
        """
        images = self.images
        y = layer._forward(images, None).float()
        if self.reference is None:
            self.reference = y
        error = float((y - self.reference).norm() / self.reference.norm().clamp_min(1e-30))
        if not math.isfinite(error) or error > TOLERANCE[dtype_name(self.x.dtype)]:
            self.failures[config] = f"differs from the first result by {error:.2e}"
            return

        def run() -> object:
            return layer._forward(images, None)

        self._runs[config] = graphed(run, self._pool) if self.images.is_cuda else run


def with_config(layer: SparseLayer, config: Config) -> SparseLayer:
    """A layer with another configuration; its tensors are shared."""
    other = copy.copy(layer)
    other.config, other._launches = config.to_key(), {}
    return other


@torch.no_grad()
def launched_ahead(layer: SparseLayer, x: LayerInput, config: Config) -> SparseLayer:
    """The layer with a configuration, its schedule made: that takes Python many times longer than a kernel runs."""
    other = with_config(layer, config)
    other.launch(torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape))
    return other


def warm_up(device: torch.device) -> None:
    """What the first measurement of a process pays for once: imports, the driver, the GPU's own kernels, a graph."""
    if device.type == "cuda":
        prepare_to_launch()
        from triton.runtime.driver import driver

        driver.active.get_current_target()
        with torch.cuda.device(device):
            x = torch.randn(64, device=device).half()
            (x.float() - x).norm().item()
            heat_us({"": graphed(lambda: x + 1)}, device, 1)
