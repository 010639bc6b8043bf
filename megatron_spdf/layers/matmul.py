"""Products with a compact weight in Megatron-Core's parallel linear layers that keep no dense copy
of it: on its tiles alone, on sparse tensor cores, or expanded for the layer, in forward and again
in backward.

Communication is that of Megatron-Core's own product,
`LinearWithGradAccumulationAndAsyncCommunication`: the input is gathered and its gradient scattered
under sequence parallelism, or summed under tensor parallelism, behind the product that gives the
weight's gradient; and that goes straight into the fp32 buffer where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_spdf.kernels import dispatch, two_four
from megatron_spdf.kernels.mask import Mask, TwoFour
from megatron_spdf.sparsity.plan import SparseWeight


class Product(Protocol):
    """y = x W^T of a compact weight W (out, in) and its gradients, over N tokens."""

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(N, out) of x (N, in)."""

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(N, in) of that of y (N, out)."""

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        """(slices, active per slice), added to `out` if there is one."""


class ExpandedProduct:
    """With the weight expanded for the moment: no copy is kept, and every micro-batch pays for
    two."""

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return x @ dispatch.expand(values, mask).T

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return gradient @ dispatch.expand(values, mask)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        return dispatch.compress(gradient.T @ x, mask, out)


@dataclass(frozen=True)
class TileProduct:
    """With the active tiles alone."""

    kernels: ModuleType | None  # None on the meta device, where nothing is multiplied

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return self.kernels.forward(x, values, mask)

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return self.kernels.input_gradient(gradient, values, mask)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        return self.kernels.weight_gradient(gradient, x, mask, out)


@dataclass(frozen=True)
class TwoFourProduct(ExpandedProduct):
    """With the active values of a 2:4 weight, on sparse tensor cores. The weight's gradient, of
    dense operands, is made whole and cut; and the weight is expanded where the kernels do not take
    the number of tokens."""

    library: two_four.Library
    dtype: torch.dtype

    def tables(self, bits: Tensor, slice_shape: tuple[int, int], axis: int) -> TwoFour:
        """Of a mask, once."""
        return two_four.find_two_four(bits, slice_shape, axis, self.library, self.dtype)

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        if len(x) % two_four.TOKENS:
            return super().forward(x, values, mask)
        return self.library.multiply(two_four.packed(values, mask), mask.two_four.metadata, x)

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        if len(gradient) % two_four.TOKENS:
            return super().input_gradient(gradient, values, mask)
        return self.library.multiply(two_four.packed_transposed(values, mask),
                                     mask.two_four.transposed, gradient)


def choose_product(weight: SparseWeight, dense: Tensor, dense_copy: str) -> Product | None:
    """What multiplies with the values of a compact weight; None where the layer multiplies with the
    expanded weight.

    Args:
        dense: the weight that becomes compact.
        dense_copy: as of `compact.sparsify`.
    """
    if dense_copy == "always":
        return None
    if weight.tile is not None:
        if dense.is_meta and dispatch.multiplies_tiles(weight.tile, dense.dtype):
            return TileProduct(None)
        found, _ = dispatch.tile_products(dense.device.type, weight.tile, dense.dtype)
        if found is not None:
            return TileProduct(found)
    if weight.two_four and (library := dispatch.two_four_library(dense)) is not None:
        return TwoFourProduct(library, dense.dtype)
    return ExpandedProduct() if dense_copy == "per_layer" else None


def add_gradient(values: Tensor, compute: Callable[[Tensor | None], Tensor]) -> Tensor:
    """The gradient of a compact parameter; where a data-parallel engine keeps an fp32 buffer for it
    and kernels can add to that, it is added there, and what comes back is of the right shape and
    never read.

    Args:
        compute: makes the gradient, or adds it to the buffer that it is given.
    """
    buffer = getattr(values, "main_grad", None)
    if buffer is None or not dispatch.adds_gradients(values.device.type):
        return compute(None)
    compute(buffer)
    values.grad_added_to_main_grad = True  # Megatron-Core's mark
    return torch.empty_like(values)


class _Multiply(torch.autograd.Function):
    """y (T, B, out) = x (T, B, in) W^T on this tensor-parallel rank, with what its group must
    exchange."""

    @staticmethod
    def forward(
        ctx, x: Tensor, values: Tensor, product: Product, mask: Mask, group, sums: bool,
        gathers: bool
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.product, ctx.mask, ctx.group, ctx.sums, ctx.gathers = (
            product,
            mask,
            group,
            sums,
            gathers,
        )
        whole = _gathered(x, group)[0] if gathers else x
        return product.forward(_tokens(whole), values, mask).view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, values), product, mask = ctx.saved_tensors, ctx.product, ctx.mask
        whole, gathering = _gathered(x, ctx.group, behind=True) if ctx.gathers else (x, None)
        rows = _tokens(gradient)
        input_gradient = product.input_gradient(rows, values, mask).view(whole.shape)
        if gathering is not None:
            gathering.wait()
        # Started here to run behind the weight's gradient: CUDA_DEVICE_MAX_CONNECTIONS=1 keeps them
        # in order.
        exchange = None
        if ctx.gathers:
            input_gradient, exchange = _scattered(input_gradient, ctx.group)
        elif ctx.sums:
            exchange = dist.all_reduce(input_gradient, group=ctx.group, async_op=True)
        values_gradient = None
        if ctx.needs_input_grad[1]:
            values_gradient = add_gradient(
                values, lambda out: product.weight_gradient(rows, _tokens(whole), mask, out))
        if exchange is not None:
            exchange.wait()
        return input_gradient, values_gradient, None, None, None, None, None


def _tokens(x: Tensor) -> Tensor:
    """(T, B, width) -> (T B, width)."""
    return x.reshape(-1, x.shape[-1])


def _gathered(x: Tensor, group, behind: bool = False) -> tuple[Tensor, Any]:
    """The whole sequence (T, B, in) of this rank's part (T / TP, B, in), in a buffer that the next
    gather takes."""
    from megatron.core.parallel_state import get_global_memory_buffer
    from megatron.core.tensor_parallel.layers import dist_all_gather_func

    whole = get_global_memory_buffer().get_tensor([len(x) * group.size(), *x.shape[1:]], x.dtype,
                                                  "mpu")
    return whole, dist_all_gather_func(whole, x.contiguous(), group=group, async_op=behind)


def _scattered(gradient: Tensor, group) -> tuple[Tensor, Any]:
    """This rank's part of the sum over ranks of a gradient (T, B, in), on its way."""
    from megatron.core.tensor_parallel.layers import dist_reduce_scatter_func

    part = gradient.new_empty(len(gradient) // group.size(), *gradient.shape[1:])
    return part, dist_reduce_scatter_func(part, gradient, group=group, async_op=True)


def install_matmul(module: nn.Module, compact) -> None:
    """Lets a Column- or RowParallelLinear multiply by its compact weight's product.

    Args:
        compact: the `CompactWeight` of the module.
    """
    module._forward_impl = partial(_forward_impl, compact)
    module.forward = partial(_forward, module, compact)


def _forward(module: nn.Module, compact, *arguments, **keywords):
    """The layer's own forward, in which `module.weight` is the values."""
    compact.pass_through = True
    try:
        return type(module).forward(module, *arguments, **keywords)
    finally:
        compact.pass_through = False


def _forward_impl(compact, input: Tensor, weight: Tensor, bias: Tensor | None,
                  allreduce_dgrad: bool, sequence_parallel: bool, tp_group, **_) -> Tensor:
    """In place of Megatron-Core's `linear_with_grad_accumulation_and_async_allreduce`, whose
    arguments it takes."""
    y = _Multiply.apply(input, weight, compact.product, compact.mask, tp_group, allreduce_dgrad,
                        sequence_parallel)
    return y if bias is None else y + bias
