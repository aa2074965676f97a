"""``BlockSparseLayer``: what ``BlockSparseConv2d`` and ``BlockSparseLinear`` share, and ``FusedLayer`` above it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tetris import ops
from tetris.dispatch import Launch, dtype_name
from tetris.eager import EagerCalls, tf32_modes
from tetris.errors import ShapeError, UnsupportedError, describe
from tetris.layout import BlockLayout
from tetris.packing import unpack
from tetris.permutation import inverse, is_identity, validate
from tetris.quantization import dequantize

Permutations = tuple[Tensor | None, Tensor | None]


class FusedLayer(nn.Module):
    """A layer with an epilogue.

    Attributes:
        activation: "none", "relu", "relu6", "silu" or "gelu".
        max_pool: 2x2 max-pooling of the result; only where the class ``pools``.
    """

    pools: ClassVar[bool] = False
    activation: str
    max_pool: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._calls = EagerCalls()

    def _forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer's work, through the registered operations."""
        raise NotImplementedError

    def eager_key(self) -> tuple:
        """What a call depends on beside tensors, see :class:`~tetris.eager.EagerCalls`."""
        return self.activation, self.max_pool

    def eager_constants(self) -> list[Tensor]:
        """Tensors that kernels read, beside parameters and buffers."""
        return []

    def _apply(self, *args: Any, **options: Any) -> FusedLayer:
        self._calls.clear()  # recordings hold the tensors that the layer leaves behind
        return super()._apply(*args, **options)


class BlockSparseLayer(FusedLayer):
    """What both layers share: packed blocks, their layout, permutations, epilogue and config.

    Attributes:
        shape: (output, input) channels.
        block: the sparsity block (out, in).
        n_blocks: stored blocks, empty block rows padded with one zero block.
        kept_fraction: kept blocks / all blocks.
        activation: "none", "relu", "relu6", "silu" or "gelu", applied in the epilogue.
        config: key of the kernel config; "" is the analytic default for the problem and device.
        values, scales: the packed blocks, a parameter. Quantised ones (``tetris.quantization``) are a buffer, beside
            them their fp32 scales [output channels] in the order of the block rows; otherwise None.
    """

    values: Tensor
    scales: Tensor | None
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor
    input_permutation: Tensor | None
    output_permutation: Tensor | None
    _output_gather: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        block: tuple[int, int],
        values: Tensor,
        scales: Tensor | None = None,
        layout: BlockLayout | None = None,
        bias: bool = True,
        activation: str = "none",
        kept_fraction: float = float("nan"),
        input_permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
        config: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.block, self.n_blocks = shape, block, values.shape[0]
        self.activation, self.kept_fraction, self.config = activation, kept_fraction, config
        device = values.device
        # Taps and outputs share a dimension: `model.to(memory_format=torch.channels_last)` restrides 4-D parameters.
        stored = values.reshape(self.n_blocks, -1, block[1])
        if scales is None:
            self.values = nn.Parameter(stored, requires_grad=False)
        else:
            self.register_buffer("values", stored)
        self.register_buffer("scales", scales)
        dtype = dtype or (values.dtype if scales is None else torch.float32)
        self.bias = nn.Parameter(values.new_zeros(shape[0], dtype=dtype), requires_grad=False) if bias else None
        rows = -(-shape[0] // block[0])
        indptr = torch.zeros(rows + 1, dtype=torch.int32) if layout is None else layout.indptr
        indices = torch.zeros(self.n_blocks, dtype=torch.int32) if layout is None else layout.indices
        self.register_buffer("indptr", indptr.to(device))
        self.register_buffer("indices", indices.to(device))
        self.register_buffer("input_permutation", _permutation_or_none(input_permutation, shape[1], device))
        self.register_buffer("output_permutation", _permutation_or_none(output_permutation, shape[0], device))
        self.register_buffer("_output_gather", _inverse_or_none(self.output_permutation), persistent=False)
        self._prepared: Any = None
        self._prepared_from: tuple | None = None
        self._launches: dict[tuple, Launch] = {}
        self._launches_from: tuple | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._calls(self, self._forward, x, residual)

    def eager_key(self) -> tuple:
        return *super().eager_key(), self.config

    def use_config(self, key: str) -> None:
        """Run with another kernel config; "" is the analytic default. Schedules and recorded calls are made anew."""
        self.config = key
        self._launches.clear()
        self._calls.clear()

    def eager_constants(self) -> list[Tensor]:
        """The schedules."""
        return [tensor for launch in self._launches.values() for tensor in launch.schedule]

    @property
    def layout(self) -> BlockLayout:
        """The stored blocks, in this layer's order of channels."""
        return BlockLayout(self.shape, self.block, self.indptr, self.indices)

    @property
    def blocks(self) -> Tensor:
        """The values in the packed format: [n_blocks, (taps,) BLOCK_OUT, BLOCK_IN]."""
        return self.values

    def dense_weight(self) -> Tensor:
        """The dense weight [C_OUT, C_IN, ...] in the order of the inputs and outputs; pruned blocks are zero.

        That of quantised weights is what they stand for, in fp32.
        """
        weight = unpack(self._blocks_in(torch.float32), self.layout, self._kernel_size())
        if self.output_permutation is not None:
            weight = weight[inverse(self.output_permutation)]
        return weight if self.input_permutation is None else weight[:, inverse(self.input_permutation)]

    def dense_bias(self) -> Tensor | None:
        """The bias in the order of the layer's outputs."""
        if self.bias is None or self.output_permutation is None:
            return self.bias
        return self.bias[inverse(self.output_permutation)]

    def _blocks_in(self, dtype: torch.dtype) -> Tensor:
        """The blocks; quantised ones times their scales, in ``dtype``."""
        return self.blocks if self.scales is None else dequantize(self.blocks, self.scales, self.indptr, dtype)

    def _kernel_size(self) -> tuple[int, ...]:
        return ()

    def _check_input(self, x: Tensor, dim: int, rank: int | None, name: str) -> None:
        if (rank is not None and x.dim() != rank) or x.dim() < 2 or x.shape[dim] != self.shape[1]:
            wanted = "[N, C_IN, H, W]" if rank == 4 else "[N, ..., C_IN]"
            raise ShapeError(f"{name}: wanted input {wanted} with C_IN = {self.shape[1]}; got {describe(x)}")

    def _use_prepared(self, x: Tensor) -> bool:
        """Whether the repacked operands of the CPU path serve: no gradient of this layer is asked for."""
        if x.device.type != "cpu":
            return False
        return not (torch.is_grad_enabled() and (self.values.requires_grad or x.requires_grad))

    def _prepare(self, x: Tensor) -> Any:
        raise NotImplementedError

    def prepared(self, x: Tensor) -> Any:
        """The CPU path's repacked operands, made for inputs of x's size, once and again whenever the values change."""
        if torch.compiler.is_compiling() and self._prepared is not None:
            return self._prepared
        if torch.compiler.is_exporting():
            raise UnsupportedError(
                f"{type(self).__name__}: wanted a first call before torch.export: it packs the weights"
            )
        state = (*self._values_state(), x.dtype)
        if self._prepared_from != state:
            self._prepared, self._prepared_from = self._prepare(x), state
        return self._prepared

    def _values_state(self) -> tuple:
        """Changes whenever the values change."""
        tensors = [self.values] if self.scales is None else [self.values, self.scales]
        # inference tensors cannot be changed
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        raise NotImplementedError

    def _make_launch(self, x: Tensor) -> Launch:
        raise NotImplementedError

    def _run(self, x: Tensor, residual: Tensor | None, dim: int) -> Tensor:
        """The registered operation; on a GPU between explicit permutations: scattered 2-byte accesses cost more.

        A permutation of whole groups of outputs happens in the kernel's store where the launch says so.
        """
        if x.device.type == "cpu":
            return self._call(x, residual, (self.input_permutation, self.output_permutation), Launch())
        permute = ops.run_permutation if ops.directly() else ops.permute_channels
        if self.input_permutation is not None:
            x = permute(x, self.input_permutation, dim)
        launch = self.launch(x)
        if self.output_permutation is None:
            return self._call(x, residual, (None, None), launch)
        if launch.permutes_output and residual is None:
            return self._call(x, None, (None, self.output_permutation), launch)
        if residual is not None:
            residual = permute(residual, self.output_permutation, dim)
        assert self._output_gather is not None
        return permute(self._call(x, residual, (None, None), launch), self._output_gather, dim)

    def launch(self, x: Tensor) -> Launch:
        """Config and schedule for inputs like ``x``, made at the first such input and kept; nothing is tuned here.

        It may hold a copy of the values, unless they are being trained: it is made again when they change. A compiled
        model does not look, and when it meets a new shape it runs the portable kernel: call the layer once before
        compiling.
        """
        if not torch.compiler.is_compiling():
            state = None if self.values.requires_grad else self._values_state()
            if self._launches_from != state:
                self._launches.clear()
                self._launches_from = state
        key = (x.shape, x.dtype, x.device, tf32_modes(x))
        found = self._launches.get(key)
        if found is None:
            if torch.compiler.is_compiling():
                return Launch()
            found = self._launches[key] = self._make_launch(x)
        return found

    def _apply(self, *args: Any, **options: Any) -> BlockSparseLayer:
        """Quantised weights and their scales move with the model but keep their dtypes."""
        before = {} if self.scales is None else {"values": self.values, "scales": self.scales}
        super()._apply(*args, **options)
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._output_gather = _inverse_or_none(self.output_permutation)
        self._launches.clear()
        self._calls.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_prepared_from": None, "_launches": {}}

    def extra_repr(self) -> str:
        parts = [f"{self.shape[1]}, {self.shape[0]}", f"block={self.block[0]}x{self.block[1]}"]
        parts.append(f"kept={self.kept_fraction:.3f}")
        parts += [f"weights={dtype_name(self.values.dtype)}"] if self.scales is not None else []
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        parts += ["permutes input"] if self.input_permutation is not None else []
        parts += ["permutes output"] if self.output_permutation is not None else []
        return ", ".join(parts + ([] if self.bias is not None else ["bias=False"]))


def _inverse_or_none(permutation: Tensor | None) -> Tensor | None:
    return None if permutation is None else inverse(permutation)


def _permutation_or_none(permutation: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    if permutation is None or is_identity(permutation):
        return None
    return validate(permutation, size).to(device, copy=True)  # loading a state must not change the caller's
