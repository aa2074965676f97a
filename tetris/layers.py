"""Drop-in layers: ``BlockSparseConv2d`` for ``nn.Conv2d`` and ``BlockSparseLinear`` for ``nn.Linear``.

A layer holds the kept blocks, their layout, and at most two permutations: of the input channels (None when the
producer already stores them in this layer's order) and of the output channels (None when the consumer wants them in
this layer's order). Both are fused into the kernel or done by one data movement; see ``tetris.conversion``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetris import ops
from tetris.dispatch import Launch, conv2d_launch, dtype_name, linear_launch
from tetris.errors import ShapeError, UnsupportedError, describe
from tetris.kernels.configs import Conv2dProblem, LinearProblem
from tetris.kernels.cpu import conv2d as cpu_conv2d
from tetris.kernels.cpu import linear as cpu_linear
from tetris.layout import BlockLayout
from tetris.packing import pack, unpack
from tetris.permutation import apply, inverse, is_identity, validate
from tetris.reordering import Reordering

Permutations = tuple[Tensor | None, Tensor | None]


class FusedLayer(nn.Module):
    """A layer whose epilogue applies ``activation``: "none", "relu", "relu6", "silu" or "gelu"."""

    activation: str


class BlockSparseLayer(FusedLayer):
    """What both layers share: packed blocks, their layout, permutations, epilogue and config.

    Attributes:
        shape: (output, input) channels.
        block: the sparsity block (out, in).
        n_blocks: stored blocks, empty block rows padded with one zero block.
        kept_fraction: kept blocks / all blocks.
        activation: "none", "relu", "relu6", "silu" or "gelu", applied in the epilogue.
        config: key of the kernel config; "" is the analytic default for the problem and device.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor
    input_permutation: Tensor | None
    output_permutation: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        block: tuple[int, int],
        values: Tensor,
        layout: BlockLayout | None = None,
        bias: bool = True,
        activation: str = "none",
        kept_fraction: float = float("nan"),
        input_permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
        config: str = "",
    ) -> None:
        super().__init__()
        self.shape, self.block, self.n_blocks = shape, block, values.shape[0]
        self.activation, self.kept_fraction, self.config = activation, kept_fraction, config
        device = values.device
        # Taps and outputs share a dimension: `model.to(memory_format=torch.channels_last)` restrides 4-D parameters.
        self.values = nn.Parameter(values.reshape(self.n_blocks, -1, block[1]), requires_grad=False)
        self.bias = nn.Parameter(values.new_zeros(shape[0]), requires_grad=False) if bias else None
        rows = -(-shape[0] // block[0])
        indptr = torch.zeros(rows + 1, dtype=torch.int32) if layout is None else layout.indptr
        indices = torch.zeros(self.n_blocks, dtype=torch.int32) if layout is None else layout.indices
        self.register_buffer("indptr", indptr.to(device))
        self.register_buffer("indices", indices.to(device))
        self.register_buffer("input_permutation", _permutation_or_none(input_permutation, shape[1], device))
        self.register_buffer("output_permutation", _permutation_or_none(output_permutation, shape[0], device))
        self._prepared: Any = None
        self._prepared_from: tuple | None = None
        self._launches: dict[tuple, Launch] = {}

    @property
    def layout(self) -> BlockLayout:
        """The stored blocks, in this layer's order of channels."""
        return BlockLayout(self.shape, self.block, self.indptr, self.indices)

    @property
    def blocks(self) -> Tensor:
        """The values in the packed format: [n_blocks, (taps,) BLOCK_OUT, BLOCK_IN]."""
        return self.values

    def dense_weight(self) -> Tensor:
        """The dense weight [C_OUT, C_IN, ...] in the order of the inputs and outputs; pruned blocks are zero."""
        weight = unpack(self.blocks, self.layout, self._kernel_size())
        if self.output_permutation is not None:
            weight = weight[inverse(self.output_permutation)]
        return weight if self.input_permutation is None else weight[:, inverse(self.input_permutation)]

    def dense_bias(self) -> Tensor | None:
        """The bias in the order of the layer's outputs."""
        if self.bias is None or self.output_permutation is None:
            return self.bias
        return self.bias[inverse(self.output_permutation)]

    def _kernel_size(self) -> tuple[int, ...]:
        return ()

    def _check_input(self, x: Tensor, dim: int, rank: int | None, name: str) -> None:
        if (rank is not None and x.dim() != rank) or x.dim() < 2 or x.shape[dim] != self.shape[1]:
            wanted = "[N, C_IN, H, W]" if rank == 4 else "[..., C_IN]"
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
        state = (self.values.data_ptr(), self.values._version, self.values.dtype)
        if self._prepared_from != state:
            self._prepared, self._prepared_from = self._prepare(x), state
        return self._prepared

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        raise NotImplementedError

    def _make_launch(self, x: Tensor) -> Launch:
        raise NotImplementedError

    def _run(self, x: Tensor, residual: Tensor | None, dim: int) -> Tensor:
        """The registered operation; on a GPU between explicit permutations: scattered 2-byte accesses cost more."""
        if x.device.type == "cpu":
            return self._call(x, residual, (self.input_permutation, self.output_permutation), Launch())
        if self.input_permutation is not None:
            x = ops.permute_channels(x, self.input_permutation, dim)
        launch = self.launch(x)
        if self.output_permutation is None:
            return self._call(x, residual, (None, None), launch)
        if residual is not None:
            residual = ops.permute_channels(residual, self.output_permutation, dim)
        return ops.permute_channels(
            self._call(x, residual, (None, None), launch), inverse(self.output_permutation), dim
        )

    def launch(self, x: Tensor) -> Launch:
        """Config and schedule for inputs like ``x``, made at the first such input and kept; nothing is tuned here.

        A compiled model that meets a new shape runs the portable kernel: call the layer once before compiling.
        """
        key = (x.shape, x.dtype, x.device, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        found = self._launches.get(key)
        if found is None:
            if torch.compiler.is_compiling():
                return Launch()
            found = self._launches[key] = self._make_launch(x)
        return found

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._launches.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_prepared_from": None, "_launches": {}}

    def extra_repr(self) -> str:
        parts = [f"{self.shape[1]}, {self.shape[0]}", f"block={self.block[0]}x{self.block[1]}"]
        parts.append(f"kept={self.kept_fraction:.3f}")
        parts += [f"activation={self.activation}"] if self.activation != "none" else []
        parts += ["permutes input"] if self.input_permutation is not None else []
        parts += ["permutes output"] if self.output_permutation is not None else []
        return ", ".join(parts + ([] if self.bias is not None else ["bias=False"]))


def _permutation_or_none(permutation: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    if permutation is None or is_identity(permutation):
        return None
    return validate(permutation, size).to(device)


def _packed(weight: Tensor, reordering: Reordering, name: str) -> tuple[Tensor, BlockLayout, float]:
    """(values, layout without empty rows, kept fraction) of a dense weight in the original order."""
    if tuple(weight.shape) != tuple(reordering.shape):
        raise ShapeError(f"{name}: the reordering is for a weight of {tuple(reordering.shape)}; got {describe(weight)}")
    layout = reordering.layout
    ordered = apply(weight.detach() * reordering.keep_mask.to(weight.device), reordering.permutations)
    stored = layout.without_empty_rows()
    stored = BlockLayout(stored.shape, stored.block, stored.indptr.to(weight.device), stored.indices.to(weight.device))
    return pack(ordered, stored), stored, layout.kept_fraction


class BlockSparseLinear(BlockSparseLayer):
    """y = activation(x W^T + bias + residual) with a block-sparse W (eq. 2); x is [..., in_features]."""

    def __init__(
        self, in_features: int, out_features: int, block: tuple[int, int], n_blocks: int, **options: Any
    ) -> None:
        values = options.pop("values", None)
        if values is None:
            values = torch.zeros(n_blocks, *block, dtype=options.pop("dtype", None), device=options.pop("device", None))
        super().__init__((out_features, in_features), block, values, **options)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        reordering: Reordering,
        *,
        activation: str = "none",
        input_permutation: Tensor | str | None = "own",
        output_permutation: Tensor | str | None = "own",
        config: str = "",
    ) -> BlockSparseLinear:
        """The block-sparse form of a linear layer.

        Args:
            linear: the dense layer; its weight is masked by ``reordering.keep_mask``.
            reordering: from :func:`tetris.reorder` on ``linear.weight`` with a block structure.
            activation: fused epilogue.
            input_permutation, output_permutation: "own" = inputs arrive and outputs leave in the original order;
                None = they arrive (leave) in the reordered order; a tensor = this gather of the inputs (this scatter
                of the outputs), for a layer between neighbours that keep other orders.
            config: kernel config key.
        """
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(f"BlockSparseLinear.from_dense: wanted an nn.Linear; got {type(linear).__name__}")
        values, layout, kept = _packed(linear.weight, reordering, "BlockSparseLinear.from_dense")
        own = _own_permutations(reordering, input_permutation, output_permutation)
        layer = cls(
            linear.in_features, linear.out_features, layout.block, layout.n_blocks, values=values, layout=layout,
            bias=linear.bias is not None, activation=activation, kept_fraction=kept, config=config, **own,
        )  # fmt: skip
        return cast(BlockSparseLinear, _copy_bias(layer, linear.bias, reordering).train(linear.training))

    def _prepare(self, x: Tensor) -> Any:
        return cpu_linear.prepare(
            self.values, self.indptr, self.indices, in_features=self.in_features, out_features=self.out_features,
            input_permutation=self.input_permutation, output_permutation=self.output_permutation,
            tokens=x.numel() // self.in_features,
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(x, -1, None, "BlockSparseLinear")
        ops.check_dtypes("BlockSparseLinear", x, self.values)
        if self._use_prepared(x):
            return cpu_linear.run(self.prepared(x), x, self.bias, activation=self.activation, residual=residual)
        return self._run(x, residual, -1)

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        return ops.block_sparse_linear(
            x, self.blocks, self.indptr, self.indices, self.bias, residual, *permutations, launch.schedule,
            self.out_features, self.activation, torch.backends.cuda.matmul.allow_tf32, launch.config,
        )  # fmt: skip

    def _make_launch(self, x: Tensor) -> Launch:
        tokens = x.numel() // x.shape[-1]
        problem = LinearProblem(
            tokens, self.in_features, self.out_features, self.block, dtype_name(x.dtype), self.n_blocks
        )
        return linear_launch(problem, self.indptr, self.indices, key=self.config)


class BlockSparseConv2d(BlockSparseLayer):
    """y = activation(conv2d(x, W) + bias + residual) with a block-sparse W (eq. 3); x is [N, C_IN, H, W].

    Blocks span (output, input) channels and all kernel taps. Tensors are channels_last; others are converted on entry.
    With ``max_pool`` the result is 2x2 max-pooled, in the kernel's registers where it can.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        block: tuple[int, int],
        n_blocks: int,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        max_pool: bool = False,
        **options: Any,
    ) -> None:
        values = options.pop("values", None)
        if values is None:
            shape = (n_blocks, kernel_size[0] * kernel_size[1], *block)
            values = torch.zeros(shape, dtype=options.pop("dtype", None), device=options.pop("device", None))
        super().__init__((out_channels, in_channels), block, values, **options)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.max_pool = max_pool

    @property
    def in_channels(self) -> int:
        return self.shape[1]

    @property
    def out_channels(self) -> int:
        return self.shape[0]

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        reordering: Reordering,
        *,
        activation: str = "none",
        input_permutation: Tensor | str | None = "own",
        output_permutation: Tensor | str | None = "own",
        config: str = "",
    ) -> BlockSparseConv2d:
        """The block-sparse form of a convolution; arguments as in :meth:`BlockSparseLinear.from_dense`.

        Raises:
            UnsupportedError: groups > 1, padding other than zeros, or uneven "same" padding.
        """
        if not isinstance(conv, nn.Conv2d):
            raise UnsupportedError(f"BlockSparseConv2d.from_dense: wanted an nn.Conv2d; got {type(conv).__name__}")
        padding = supported_padding(conv)
        values, layout, kept = _packed(conv.weight, reordering, "BlockSparseConv2d.from_dense")
        own = _own_permutations(reordering, input_permutation, output_permutation)
        layer = cls(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), layout.block, layout.n_blocks,
            _pair(conv.stride), padding, _pair(conv.dilation), values=values, layout=layout,
            bias=conv.bias is not None, activation=activation, kept_fraction=kept, config=config, **own,
        )  # fmt: skip
        return cast(BlockSparseConv2d, _copy_bias(layer, conv.bias, reordering).train(conv.training))

    @property
    def blocks(self) -> Tensor:
        return self.values.view(self.n_blocks, -1, *self.block)

    def _kernel_size(self) -> tuple[int, ...]:
        return self.kernel_size

    def _prepare(self, x: Tensor) -> Any:
        return cpu_conv2d.prepare(
            self.blocks, self.indptr, self.indices, c_in=self.in_channels, c_out=self.out_channels,
            kernel_size=self.kernel_size, input_permutation=self.input_permutation,
            output_permutation=self.output_permutation, pixels=x.numel() // self.in_channels,
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(x, 1, 4, "BlockSparseConv2d")
        ops.check_dtypes("BlockSparseConv2d", x, self.values)
        if self._use_prepared(x):
            y = cpu_conv2d.run(
                self.prepared(x), x, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
                activation=self.activation, residual=residual,
            )  # fmt: skip
            return F.max_pool2d(y, 2) if self.max_pool else y
        return self._run(x, residual, 1)

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        return ops.block_sparse_conv2d(
            x, self.blocks, self.indptr, self.indices, self.bias, residual, *permutations, launch.schedule,
            self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.activation,
            self.max_pool, torch.backends.cudnn.allow_tf32, launch.config,
        )  # fmt: skip

    def _make_launch(self, x: Tensor) -> Launch:
        problem = Conv2dProblem(
            x.shape[0], self.in_channels, self.out_channels, x.shape[2], x.shape[3], self.kernel_size, self.stride,
            self.padding, self.dilation, self.block, dtype_name(x.dtype), self.n_blocks,
        )  # fmt: skip
        tf32 = torch.backends.cudnn.allow_tf32
        return conv2d_launch(
            problem, self.indptr, self.indices, key=self.config, max_pool=self.max_pool, allow_tf32=tf32
        )

    def extra_repr(self) -> str:
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        geometry += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        geometry += ", max_pool" if self.max_pool else ""
        return f"{super().extra_repr()}, {geometry}"


def supported_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The (height, width) zero padding of a convolution that the kernels can run; raises UnsupportedError otherwise."""
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise UnsupportedError(
            f"BlockSparseConv2d: wanted groups=1 and padding_mode='zeros'; got groups={conv.groups}, "
            f"padding_mode={conv.padding_mode!r}; leave this layer dense"
        )
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        if any(t % 2 for t in total):
            raise UnsupportedError(
                f"BlockSparseConv2d: padding='same' needs an odd effective kernel; got kernel_size={conv.kernel_size}, "
                f"dilation={conv.dilation}; leave this layer dense"
            )
        return total[0] // 2, total[1] // 2
    return _pair(conv.padding)


def _pair(value: Any) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def _own_permutations(reordering: Reordering, given_in: Any, given_out: Any) -> dict[str, Tensor | None]:
    """Keyword arguments for the layer; a reordered output j is original channel p0[j], so it is stored there."""
    own = reordering.permutations
    return {
        "input_permutation": own.get(1) if isinstance(given_in, str) else given_in,
        "output_permutation": own.get(0) if isinstance(given_out, str) else given_out,
    }


def _copy_bias(layer: BlockSparseLayer, bias: Tensor | None, reordering: Reordering) -> BlockSparseLayer:
    if bias is not None and layer.bias is not None:
        with torch.no_grad():
            order = reordering.permutations.get(0)
            layer.bias.copy_(bias if order is None else apply(bias, {0: order}))
    return layer
