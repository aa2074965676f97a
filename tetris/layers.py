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
from tetris.block_sparse_layer import BlockSparseLayer, Permutations
from tetris.dispatch import Launch, conv2d_launch, dtype_name, linear_launch
from tetris.errors import ShapeError, UnsupportedError, describe
from tetris.kernels.configs import Conv2dProblem, LinearProblem
from tetris.kernels.cpu import conv2d as cpu_conv2d
from tetris.kernels.cpu import linear as cpu_linear
from tetris.layout import BlockLayout
from tetris.packing import pack
from tetris.permutation import apply, group_size
from tetris.quantization import quantize, stored_dtype
from tetris.reordering import Reordering


def _masked(weight: Tensor, reordering: Reordering, name: str) -> tuple[Tensor, BlockLayout, float]:
    """(reordered masked weight, layout without empty rows, kept fraction) of a dense weight in the original order."""
    if tuple(weight.shape) != tuple(reordering.shape):
        raise ShapeError(f"{name}: the reordering is for a weight of {tuple(reordering.shape)}; got {describe(weight)}")
    if weight.dtype not in ops.DTYPES:
        raise UnsupportedError(f"{name}: wanted weights in float16, bfloat16 or float32; got {describe(weight)}")
    layout = reordering.layout
    ordered = apply(weight.detach() * reordering.keep_mask.to(weight.device), reordering.permutations)
    stored = layout.without_empty_rows()
    stored = BlockLayout(stored.shape, stored.block, stored.indptr.to(weight.device), stored.indices.to(weight.device))
    return ordered, stored, layout.kept_fraction


class BlockSparseLinear(BlockSparseLayer):
    """y = activation(x W^T + bias + residual) with a block-sparse W (eq. 2); x is [..., in_features].

    Weights may be quantised (``weight_dtype`` "int8" or "float8_e4m3fn", or values with scales), x and y are not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: tuple[int, int],
        n_blocks: int,
        weight_dtype: str = "",
        **options: Any,
    ) -> None:
        values, device = options.pop("values", None), options.pop("device", None)
        if values is None:
            dtype = stored_dtype(weight_dtype) if weight_dtype else options.get("dtype")
            values = torch.zeros(n_blocks, *block, dtype=dtype, device=device)
            options["scales"] = torch.ones(out_features, device=device) if weight_dtype else None
        super().__init__((out_features, in_features), block, values, **options)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def weight_dtype(self) -> str:
        """The dtype of quantised weights; "" = the activations'."""
        return "" if self.scales is None else dtype_name(self.values.dtype)

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
        weight_dtype: torch.dtype | str | None = None,
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
            weight_dtype: "int8" or "float8_e4m3fn" store the weights in one byte with a scale an output channel; None
                keeps their dtype.
        """
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(f"BlockSparseLinear.from_dense: wanted an nn.Linear; got {type(linear).__name__}")
        weight, layout, kept = _masked(linear.weight, reordering, "BlockSparseLinear.from_dense")
        scales = None
        if weight_dtype is not None:
            weight, scales = quantize(weight, stored_dtype(weight_dtype))
        own = _own_permutations(reordering, input_permutation, output_permutation)
        layer = cls(
            linear.in_features, linear.out_features, layout.block, layout.n_blocks, values=pack(weight, layout),
            scales=scales, layout=layout, bias=linear.bias is not None, activation=activation, kept_fraction=kept,
            config=config, dtype=linear.weight.dtype, **own,
        )  # fmt: skip
        return cast(BlockSparseLinear, _copy_bias(layer, linear.bias, reordering).train(linear.training))

    def _prepare(self, x: Tensor) -> Any:
        return cpu_linear.prepare(
            self._blocks_in(x.dtype), self.indptr, self.indices, in_features=self.in_features,
            out_features=self.out_features, input_permutation=self.input_permutation,
            output_permutation=self.output_permutation, tokens=x.numel() // self.in_features,
        )  # fmt: skip

    def _forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        self._check_input(x, -1, None, "BlockSparseLinear")
        ops.check_dtypes("BlockSparseLinear", x, self.values)
        if self._use_prepared(x):
            return cpu_linear.run(self.prepared(x), x, self.bias, activation=self.activation, residual=residual)
        return self._run(x, residual, -1)

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        linear = ops.run_linear if ops.directly() else ops.block_sparse_linear
        return linear(
            x, self.blocks, self.indptr, self.indices, self.bias, residual, *permutations, launch.schedule,
            self.out_features, self.activation, torch.backends.cuda.matmul.allow_tf32, launch.config, self.scales,
        )  # fmt: skip

    def _make_launch(self, x: Tensor) -> Launch:
        tokens = x.numel() // x.shape[-1]
        problem = LinearProblem(
            tokens, self.in_features, self.out_features, self.block, dtype_name(x.dtype), self.n_blocks,
            self.weight_dtype,
        )  # fmt: skip
        return linear_launch(problem, self.indptr, self.indices, key=self.config)


class BlockSparseConv2d(BlockSparseLayer):
    """y = activation(conv2d(x, W) + bias + residual) with a block-sparse W (eq. 3); x is [N, C_IN, H, W].

    Blocks span (output, input) channels and all kernel taps. Tensors are channels_last; others are converted on entry.
    With ``max_pool`` the result is 2x2 max-pooled, in the kernel's registers where it can.
    """

    pools = True

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
        weight, layout, kept = _masked(conv.weight, reordering, "BlockSparseConv2d.from_dense")
        own = _own_permutations(reordering, input_permutation, output_permutation)
        layer = cls(
            conv.in_channels, conv.out_channels, pair(conv.kernel_size), layout.block, layout.n_blocks,
            pair(conv.stride), padding, pair(conv.dilation), values=pack(weight, layout), layout=layout,
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

    def _forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        self._check_input(x, 1, 4, "BlockSparseConv2d")
        ops.check_dtypes("BlockSparseConv2d", x, self.values)
        if self._use_prepared(x):
            return cpu_conv2d.run(
                self.prepared(x), x, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
                activation=self.activation, residual=residual, max_pool=self.max_pool,
            )  # fmt: skip
        return self._run(x, residual, 1)

    def _call(self, x: Tensor, residual: Tensor | None, permutations: Permutations, launch: Launch) -> Tensor:
        conv2d = ops.run_conv2d if ops.directly() else ops.block_sparse_conv2d
        y = conv2d(
            x, self.blocks, self.indptr, self.indices, self.bias, residual, *permutations, launch.schedule,
            self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, self.activation,
            launch.pools, torch.backends.cudnn.allow_tf32, launch.config,
        )  # fmt: skip
        # an operation of its own, so that the convolution's launches can be repeated
        return F.max_pool2d(y, 2) if self.max_pool and not launch.pools else y

    def _make_launch(self, x: Tensor) -> Launch:
        problem = Conv2dProblem(
            x.shape[0], self.in_channels, self.out_channels, x.shape[2], x.shape[3], self.kernel_size, self.stride,
            self.padding, self.dilation, self.block, dtype_name(x.dtype), self.n_blocks,
        )  # fmt: skip
        tf32 = torch.backends.cudnn.allow_tf32
        return conv2d_launch(
            problem, self.indptr, self.indices, key=self.config, max_pool=self.max_pool, allow_tf32=tf32,
            values=None if self.values.requires_grad else self.blocks,
            output_group=0 if self.output_permutation is None else group_size(self.output_permutation),
        )  # fmt: skip

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
    return pair(conv.padding)


def pair(value: Any) -> tuple[int, int]:
    """A convolution's setting of two entries as plain integers."""
    return int(value[0]), int(value[1])


def _own_permutations(reordering: Reordering, given_in: Any, given_out: Any) -> dict[str, Any]:
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
