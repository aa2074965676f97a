"""Plans: what to do with every layer of a model, and the measurements that say why. Plain data, to and from JSON.

A :class:`ModelPlan` is made by ``tetris.plan``, printed as a table, edited by hand where a user knows better (a layer's
``block`` and ``sparsity`` are all that pruning reads) and carried to other machines. It holds no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tetris.errors import FileFormatError, TetrisError
from tetris.files import write_text
from tetris.json_fields import complete_fields, known_fields, list_of, sizes

FORMAT = "tetris-plan"
VERSION = 1
KINDS = ("conv2d", "linear")
SHARED, GROUPED, SEPARATE = ORDERS = ("shared", "grouped", "separate")
"""Whose order a layer's channels have: all layers' that meet there (free at run time), or its own, in whole groups of
channels that the kernel's store moves, or at the cost of a data movement. See :mod:`tetris.autotune.own_orders`."""
GROUP = 16
"""Channels that a grouped order moves together: 32 bytes in half precision, a whole sector of memory."""

Block = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """One measured way to run a layer.

    Attributes:
        block: (out, in) block; None is the dense layer.
        sparsity: fraction of the blocks pruned, as asked.
        kept_fraction: blocks kept / all blocks.
        retained: kept importance / total importance after reordering.
        time_us: time of the layer at the plan's batch and dtype: the median on a GPU, the 10th percentile on a CPU,
            where other processes only ever add time.
        p10_us, p90_us: the spread of that time.
        config: key of the kernel configuration that was timed; "" is the kernel's own default.
    """

    block: Block | None
    sparsity: float
    kept_fraction: float
    retained: float
    time_us: float
    p10_us: float = 0.0
    p90_us: float = 0.0
    config: str = ""

    @property
    def label(self) -> str:
        """ "dense" or "64x32"."""
        return block_label(self.block)


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one prunable layer.

    Attributes:
        name: the module's name in the model.
        kind: "conv2d" or "linear".
        shape: the weight's shape.
        block: the (out, in) block to prune and run with; None leaves the layer dense.
        sparsity: fraction of its blocks to prune; 0 where dense. 0 with a block runs the dense weights on the block
            kernel, whose epilogue saves passes over memory.
        importance: total importance of the weight, the unit in which losses of different layers are added.
        input_shape: shape of the input that was measured; () if nothing was measured.
        candidates: everything measured, the dense layer first; () in a plan written by hand.
        reason: why this choice, one sentence.
        failures: candidates that did not run, with the reason; they are never chosen.
        output_order, input_order: one of ORDERS.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: Block | None = None
    sparsity: float = 0.0
    importance: float = 0.0
    input_shape: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""
    failures: tuple[str, ...] = ()
    output_order: str = SHARED
    input_order: str = SHARED

    @property
    def dense(self) -> Candidate | None:
        """The measurement of the dense layer, if there is one."""
        return next((c for c in self.candidates if c.block is None), None)

    @property
    def chosen(self) -> Candidate | None:
        """The measurement of the choice; None for a plan by hand or a choice that was never measured."""
        return next((c for c in self.candidates if c.block == self.block and c.sparsity == self.sparsity), None)

    @property
    def kept_fraction(self) -> float:
        """Blocks kept by the choice / all blocks; 1 where dense."""
        return self.chosen.kept_fraction if self.chosen else 1.0 - self.sparsity

    @property
    def retained(self) -> float:
        """Importance kept by the choice / total; 1 where dense, NaN where it was never measured."""
        if self.block is None:
            return 1.0
        return self.chosen.retained if self.chosen else float("nan")

    @property
    def config(self) -> str:
        """Key of the kernel configuration measured with the choice; "" is the kernel's default."""
        return self.chosen.config if self.chosen else ""

    @property
    def speedup(self) -> float:
        """Dense time / chosen time; NaN where not measured."""
        if self.chosen is None or self.dense is None:
            return float("nan")
        return self.dense.time_us / self.chosen.time_us

    def with_choice(self, block: Block | None, sparsity: float, reason: str = "set by hand") -> LayerPlan:
        """The same measurements with another decision."""
        found = replace(self, block=block, sparsity=sparsity if block else 0.0, reason=reason)
        return found if block else replace(found, output_order=SHARED, input_order=SHARED)

    def without_movements(self) -> LayerPlan:
        """The same choice with shared orders in the place of separate ones: nothing is moved at run time."""
        output_order, input_order = (
            SHARED if order == SEPARATE else order for order in (self.output_order, self.input_order)
        )
        return replace(self, output_order=output_order, input_order=input_order)


@dataclass(frozen=True)
class EndToEnd:
    """The whole network, dense against converted, both run the same way in one interleaved measurement.

    Attributes:
        how: "eager", "graph" (CUDA graph) or "compile" (torch.compile and, on a GPU, a CUDA graph).
        dense_us, converted_us: medians in microseconds.
        note: what was given up so that the network is not slower; "" where the layers' choices stood.
    """

    how: str
    dense_us: float
    converted_us: float
    note: str = ""

    @property
    def speedup(self) -> float:
        """Dense time / converted time."""
        return self.dense_us / self.converted_us

    def __str__(self) -> str:
        times = f"dense {self.dense_us:.1f} -> converted {self.converted_us:.1f} us, {self.speedup:.2f}x"
        return f"whole network ({self.how}): {times}" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class ModelPlan:
    """Decisions for a model's prunable layers, in the order of execution, and where they were measured.

    Attributes:
        layers: one LayerPlan a prunable layer.
        device, versions, dtype: where and how the times were taken.
        method: the reordering that made the measured layouts.
        budget: what was asked for, in words.
        end_to_end: the network as a whole; None where it was not measured.
    """

    layers: tuple[LayerPlan, ...]
    device: str = ""
    versions: str = ""
    dtype: str = ""
    method: str = "paper"
    budget: str = ""
    end_to_end: EndToEnd | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise TetrisError(f"plan: no layer named {name!r}; it has {', '.join(layer.name for layer in self.layers)}")

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    @property
    def blocks(self) -> dict[str, Block]:
        """Layer name -> block, for the layers that are not dense."""
        return {layer.name: layer.block for layer in self.layers if layer.block is not None}

    @property
    def sparsities(self) -> dict[str, float]:
        """Layer name -> sparsity, for the layers that are not dense."""
        return {layer.name: layer.sparsity for layer in self.layers if layer.block is not None}

    @property
    def full_layers(self) -> dict[str, Block]:
        """Layer name -> block, for layers that run on the block kernel without being pruned (for its epilogue)."""
        return {name: block for name, block in self.blocks.items() if self[name].sparsity == 0.0}

    @property
    def dense_us(self) -> float:
        """Sum of the measured dense times in microseconds."""
        return sum(layer.dense.time_us for layer in self.layers if layer.dense)

    @property
    def planned_us(self) -> float:
        """Sum of the chosen times of the measured layers in microseconds."""
        return sum(layer.chosen.time_us for layer in self.layers if layer.chosen and layer.dense)

    @property
    def speedup(self) -> float:
        """Over the prunable layers: sum of dense times / sum of chosen times; NaN where nothing was measured."""
        return self.dense_us / self.planned_us if self.planned_us else float("nan")

    @property
    def retained(self) -> float:
        """Kept importance / total importance over all layers (the paper's eq. 5 summed over the model)."""
        total = sum(layer.importance for layer in self.layers)
        return sum(layer.importance * layer.retained for layer in self.layers) / total if total else float("nan")

    def with_layer(self, layer: LayerPlan) -> ModelPlan:
        """The plan with the layer of that name replaced."""
        self[layer.name]
        return replace(self, layers=tuple(layer if old.name == layer.name else old for old in self.layers))

    def __str__(self) -> str:
        return plan_table(self)

    def to_json(self) -> str:
        """The plan as indented, versioned JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "plan") -> ModelPlan:
        """Read what :meth:`to_json` wrote, possibly edited; ``source`` names it in errors.

        Raises:
            FileFormatError: no JSON, another format or version, missing or wrong fields.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"{source}: wanted a plan in JSON; got text that is no JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FileFormatError(f'{source}: wanted a plan ("format": "{FORMAT}"); got another kind of JSON')
        if data.get("version") != VERSION:
            raise FileFormatError(
                f"{source}: wanted plan version {VERSION}; got {data.get('version')!r}; make the plan again"
            )
        layers = list_of(data.get("layers"), f"{source}: layers")
        rest = known_fields(data, ModelPlan, source, ignore=("format", "version", "layers"))
        if (whole := rest.get("end_to_end")) is not None:
            rest["end_to_end"] = EndToEnd(**complete_fields(whole, EndToEnd, f"{source}: end_to_end"))
        return ModelPlan(tuple(_layer(entry, f"{source}: layer {i}") for i, entry in enumerate(layers)), **rest)

    def save(self, path: str | Path) -> Path:
        """Write the JSON atomically: a reader sees the old file or the whole new one. Returns the path."""
        write_text(path, self.to_json())
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> ModelPlan:
        """Read a plan's file. Raises FileFormatError if it is missing, corrupt or of another version."""
        path = Path(path)
        if not path.is_file():
            raise FileFormatError(f"plan: wanted a plan's JSON at {path}; there is no such file")
        try:
            return ModelPlan.from_json(path.read_text(encoding="utf-8"), source=f"plan {path}")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"plan {path}: wanted JSON text; got bytes that are no text") from error


def block_label(block: Block | None) -> str:
    """ "64x32", or "dense" for None."""
    return "dense" if block is None else f"{block[0]}x{block[1]}"


def plan_table(plan: ModelPlan, style: str = "simple") -> str:
    """A line a layer: the speedup of every candidate block, ``*`` at the chosen one, and why. ``style``: tabulate's."""
    from tabulate import tabulate

    labels = sorted({c.block for layer in plan for c in layer.candidates if c.block}, key=lambda b: (b[0] * b[1], b))
    lines = []
    for layer in plan:
        dense = layer.dense
        cells = [_speedup_cell(layer, block) for block in labels]
        lines.append(
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{dense.time_us:.1f}" + (" *" if layer.block is None else "") if dense else "",
                *cells,
                block_label(layer.block),
                f"{layer.kept_fraction:.2f}",
                f"{layer.retained:.3f}",
                layer.reason,
            ]
        )
    head = ["layer", "weight", "dense us", *(block_label(b) for b in labels), "plan", "kept", "retained", "why"]
    full = len(plan.full_layers)
    summary = f"{len(plan.blocks) - full} of {len(plan)} layers pruned"
    summary += f", {full} run unpruned on the block kernel" if full else ""
    if plan.dense_us and plan.planned_us:
        summary += f"; measured layers {plan.dense_us:.1f} -> {plan.planned_us:.1f} us, {plan.speedup:.2f}x"
    where = ", ".join(filter(None, [plan.device, plan.dtype, plan.versions, plan.budget]))
    table = tabulate(lines, headers=head, tablefmt=style, disable_numparse=True)
    whole = [str(plan.end_to_end)] if plan.end_to_end else []
    return "\n".join([table, f"{summary}; importance retained {plan.retained:.3f}", *whole, where])


def _speedup_cell(layer: LayerPlan, block: Block) -> str:
    """Speedup of a block: starred where it was chosen, else at the chosen sparsity, else its fastest measured."""
    if layer.dense is None:
        return ""
    if layer.block == block and layer.chosen:
        return f"{layer.speedup:.2f} *"
    times = [c.time_us for c in layer.candidates if c.block == block]
    asked = [c.time_us for c in layer.candidates if c.block == block and c.sparsity == layer.sparsity]
    return f"{layer.dense.time_us / min(asked or times):.2f}" if times else ""


def _block(value: Any, source: str) -> Block | None:
    if value is None:
        return None
    pair = sizes([value, value] if isinstance(value, int) else value, source)
    if len(pair) != 2:
        raise FileFormatError(f"{source}: wanted [out, in] or null for dense; got {value!r}")
    return pair[0], pair[1]


def _layer(data: Any, source: str) -> LayerPlan:
    found = complete_fields(data, LayerPlan, source)
    source = f"{source} ({found['name']})"
    if found["kind"] not in KINDS:
        raise FileFormatError(f"{source}: kind wants one of {', '.join(KINDS)}; got {found['kind']!r}")
    found["shape"] = sizes(found["shape"], f"{source}: shape")
    found["block"] = _block(found.get("block"), f"{source}: block")
    found["input_shape"] = sizes(found.get("input_shape", []), f"{source}: input_shape")
    entries = list_of(found.get("candidates", []), f"{source}: candidates")
    found["candidates"] = tuple(_candidate(entry, f"{source}: candidate {i}") for i, entry in enumerate(entries))
    found["failures"] = tuple(map(str, list_of(found.get("failures", []), f"{source}: failures")))
    for side in ("output_order", "input_order"):
        if found.get(side, SHARED) not in ORDERS:
            raise FileFormatError(f"{source}: {side} wants one of {', '.join(ORDERS)}; got {found[side]!r}")
    if not 0 <= found.get("sparsity", 0.0) < 1:
        raise FileFormatError(f"{source}: sparsity wants a number in [0, 1); got {found['sparsity']!r}")
    return LayerPlan(**found)


def _candidate(data: Any, source: str) -> Candidate:
    found = complete_fields(data, Candidate, source)
    return Candidate(**{**found, "block": _block(found["block"], f"{source}: block")})
