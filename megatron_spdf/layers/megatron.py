"""Compact weights of Megatron-Core's parallel linear layers: products that keep no dense copy of a
weight, gradients where its data parallelism wants them, tensors for its checkpoints.

Communication is that of Megatron-Core's own product,
`LinearWithGradAccumulationAndAsyncCommunication`: the input is gathered and its gradient scattered
under sequence parallelism, or summed under tensor parallelism, behind the product that gives the
weight's gradient; and that goes straight into the fp32 buffer where there is one.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_spdf.kernels import dispatch
from megatron_spdf.layers.compact import CompactWeight, Compute, compact_of, make_compact
from megatron_spdf.layers.masked import MaskedProduct, MaskedWeight
from megatron_spdf.layers.products.base import choose_product
from megatron_spdf.sparsity.plan import SparseWeight

# Tensors of a compact layer, and their names in a checkpoint.
_IN_FILE = {"parametrizations.weight.original": "weight.values",
            "parametrizations.weight.0.mask_bits": "weight.mask_bits",
            "parametrizations.weight.0.held_bits": "weight.held_bits",
            "parametrizations.weight.0.first_bits": "weight.first_bits",
            "parametrizations.weight.0.ages": "weight.ages",
            "parametrizations.weight.0.trained_bits": "weight.trained_bits"}
DenseCopy = Literal["per_step", "per_layer", "always"]


def sparsify_layer(
    module: nn.Module, weight: SparseWeight, seed: int, rank: int, world: int,
    dense_copy: DenseCopy, micro_batches: int
) -> None:
    """Makes the weight of a Column- or RowParallelLinear compact.

    Args:
        rank, world: of the tensor-parallel group.
        dense_copy: how the dense weight comes about where no kernel multiplies with the values:
            once for all the time that `compact.expanded` is entered; for each layer, in forward and
            again in backward; "always" where the layer reads it, and never a product with the
            values.
        micro_batches: backward passes of a step.
    """
    place = weight, seed, rank, world, module.weight.device
    if weight.algorithm.keeps:
        product = MaskedProduct() if dense_copy == "per_layer" else None
        compact = MaskedWeight(*place, product, micro_batches)
    else:
        product = choose_product(weight, module.weight, dense_copy)
        compact = CompactWeight(*place, product)
    compact.deliver = add_gradient
    own = {"sharded_state_dict": MethodType(_sharded_state_dict, module)}
    if product is not None:
        own |= {"_forward_impl": partial(_forward_impl, compact),
                "forward": partial(_forward, module, compact)}
    make_compact(module, compact, **own)


def add_gradient(values: Tensor, compute: Compute) -> Tensor:
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
    """y (T, B, out) = x (T, B, in) W^T, plus a bias (out,) if there is one, on this tensor-parallel
    rank, with what its group must exchange."""

    @staticmethod
    def forward(
        ctx, x: Tensor, values: Tensor, bias: Tensor | None, compact: CompactWeight, group,
        sums: bool, gathers: bool
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.compact, ctx.mask = compact, compact.mask
        ctx.group, ctx.sums, ctx.gathers = group, sums, gathers
        product, mask = compact.product, ctx.mask
        whole = _gathered(x, group)[0] if gathers else x
        y = (product.forward(_tokens(whole), values, mask) if bias is None else
             product.biased(_tokens(whole), values, mask, bias))
        return y.view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, values), product, mask = ctx.saved_tensors, ctx.compact.product, ctx.mask
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
        ctx.compact.collect(lambda: rows.T @ _tokens(whole))
        if ctx.needs_input_grad[1]:
            values_gradient = add_gradient(
                values, lambda out: ctx.compact.finish(
                    product.weight_gradient(rows, _tokens(whole), mask, out), values))
        bias_gradient = gradient.sum((0, 1)) if ctx.needs_input_grad[2] else None
        if exchange is not None:
            exchange.wait()
        return input_gradient, values_gradient, bias_gradient, None, None, None, None


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


def _forward(module: nn.Module, compact: CompactWeight, *arguments, **keywords):
    """The layer's own forward, in which `module.weight` is the values."""
    compact.pass_through = True
    try:
        return type(module).forward(module, *arguments, **keywords)
    finally:
        compact.pass_through = False


def _forward_impl(compact: CompactWeight, input: Tensor, weight: Tensor, bias: Tensor | None,
                  allreduce_dgrad: bool, sequence_parallel: bool, tp_group, **_) -> Tensor:
    """Replaces Megatron-Core's `linear_with_grad_accumulation_and_async_allreduce`, whose
    arguments it takes."""
    return _Multiply.apply(input, weight, bias, compact, tp_group, allreduce_dgrad,
                           sequence_parallel)


def _sharded_state_dict(module, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
    """What a compact layer puts into Megatron-Core's distributed checkpoint: values and mask bits
    as tensors cut along their first axis, the slices; the bias as before."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    axes = dict.fromkeys(_IN_FILE, 0)
    if compact_of(module).planned.axis == 0:
        axes["bias"] = 0
    state = {k: v for k,
             v in module.state_dict(keep_vars=True).items() if v is not None
             and "_extra_state" not in k}
    sharded = make_sharded_tensors_for_checkpoint(
        state, prefix, axes, sharded_offsets, tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"])
    for tensor in sharded.values():
        for name, stored in _IN_FILE.items():
            tensor.key = tensor.key.replace(name, stored)
    return sharded
