"""The compact weight: a parametrization of any layer that has a `weight` (out, in).

`module.parametrizations.weight.original` is the parameter, (slices of this rank, active per slice):
two axes, so that optimizers decay it like the matrix it is, and cut along the first by parallelism
like any weight. `module.weight` is computed from it. What Megatron-Core's layers need beside that
is in `megatron.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.mask import Mask, pack, unpack
from megatron_spdf.layers.products.base import Product
from megatron_spdf.sparsity.history import Change, aged, common
from megatron_spdf.sparsity.moving import Carrier, born
from megatron_spdf.sparsity.plan import SparseWeight

TABLE = "table_"  # how names of buffers with a product's tables begin


# Makes a gradient, or adds it to the buffer that it is given.
Compute = Callable[[Tensor | None], Tensor]


class _Expand(torch.autograd.Function):
    """Dense weight from compact values; backward cuts the dense gradient to the active
    positions."""

    @staticmethod
    def forward(ctx, values: Tensor, compact: CompactWeight) -> Tensor:
        # On ctx, not in save_for_backward: one expansion serves all micro-batches of a step, and
        # saved tensors would be freed by the backward of the first.
        ctx.values, ctx.mask, ctx.compact = values, compact.mask, compact
        return compact.expand(values, ctx.mask)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        compact = ctx.compact
        # signed, and before the cut: what is masked is of interest here
        compact.collect(lambda: grad)
        values, mask = ctx.values, ctx.mask
        return compact.deliver(values, lambda out: compact.finish(
            compact.compress(grad, mask, out), values)), None


class CompactWeight(nn.Module):
    """Maps the active values of this rank's slices to its shard of the dense weight and back.

    Args:
        weight: the plan's entry.
        seed: of the masks.
        rank, world: of the tensor-parallel group; the rank holds slices [rank, rank + 1) * C /
            world.
        device: where the weight lives; on the meta device nothing is drawn and buffers have shapes
            only.
        product: multiplies with the values without a kept dense weight, if the layer can use one.

    Attributes:
        pass_through: `forward` hands the values on as they are, to the product of the layer that is
            running.
        deliver: takes the values and what computes their gradient, and returns it; a framework may
            want it elsewhere.
        replaced: names of what the layer has of its own while its weight is compact.
        collector: takes the gradient of the dense weight in backward; None: none is wanted.
        held_bits: the active entries that are held at zero until the stage of the run ends, if the
            plan's algorithm holds any; their gradient is zero too.
        first_bits: as `mask_bits`, the mask at the beginning of the stage of the run, if the plan's
            algorithm keeps track of that.
        ages: (local slices, k) uint8, moves since each active entry was born, if it asks for them.
    """

    mask_bits: Tensor  # (local slices, ceil(entries per slice / 8)) uint8, numpy.packbits order
    held_bits: Tensor  # (local slices, ceil(k / 8)) uint8
    first_bits: Tensor  # as mask_bits
    ages: Tensor
    index: Tensor

    def __init__(self, weight: SparseWeight, seed: int, rank: int, world: int,
                 device: torch.device | str, product: Product | None = None):
        super().__init__()
        assert weight.slices % world == 0, (weight, world)
        local = weight.slices // world
        numel, k = math.prod(weight.slice_shape), weight.stored_per_slice
        self.planned, self.product, self.pass_through = weight, product, False
        self.deliver: Callable[[Tensor, Compute], Tensor] = _return_gradient
        self.replaced: list[str] = []
        self.collector: Collector | None = None
        self.shape = _local_shape(weight, world)
        self.values_shape = (local, k)
        if torch.device(device).type == "meta":
            bits = torch.empty((local, math.ceil(numel / 8)), dtype=torch.uint8, device=device)
        else:
            masks = [weight.draw(seed, rank * local + c) for c in range(local)]
            bits = torch.from_numpy(np.packbits(masks, axis=1)).to(device)
        self.register_buffer("mask_bits", bits)
        if weight.algorithm.holds:
            held = torch.zeros((local, math.ceil(k / 8)), dtype=torch.uint8, device=device)
            self.register_buffer("held_bits", held)
        if weight.algorithm.tracks:
            self.register_buffer("first_bits", bits.clone())
        if weight.algorithm.tracks_ages:
            shape = local, weight.active_per_slice
            ages = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.register_buffer("ages", ages)
        self._holds = -1, False  # version of held_bits -> whether any is set
        self.index_mask()
        self.register_load_state_dict_post_hook(lambda compact, _: compact.take_loaded())

    def index_mask(self) -> None:
        """Derives what the kernels use from `mask_bits`: at the start, and where a checkpoint
        brought another mask.

        Raises:
            ValueError: the mask has another density than planned, or another pattern.
        """
        if not self.mask_bits.is_meta:
            self._check_masks()
        self._derive()

    def _derive(self) -> None:
        planned = self.planned
        index = dispatch.make_index(self.mask_bits, planned.slice_shape, planned.axis)
        self.register_buffer("index", index, persistent=False)
        tables = self.product.tables(self.mask_bits, planned) if self.product else None
        tensors = {} if tables is None else {
            name: value for name, value in vars(tables).items() if isinstance(value, Tensor)}
        for name, value in tensors.items():  # buffers follow the module from device to device
            self.register_buffer(TABLE + name, value, persistent=False)
        self._table_names = list(tensors)
        self._tables = tables and replace(tables, **dict.fromkeys(tensors))

    def take_loaded(self) -> None:
        """Follows a checkpoint that has filled values and masks.

        Raises:
            ValueError: see `index_mask`.
        """
        self.index_mask()

    def choose(self, values: Tensor) -> None:
        """Lets the values choose their mask anew, where the algorithm says so and it is due."""

    def begin_with(self, bits: Tensor) -> None:
        """Takes the masks that training begins with.

        Raises:
            ValueError: see `index_mask`.
        """
        self.mask_bits.copy_(bits)
        if self.planned.algorithm.tracks:
            self.first_bits.copy_(bits)
        self.index_mask()

    def move_mask(self, bits: Tensor) -> Change:
        """Takes other masks of the plan's, and says what that changes; what the values are then is
        the caller's."""
        moved = born(self.mask_bits, bits)
        before = self.mask_bits.clone()
        self.mask_bits.copy_(bits)
        if self.planned.algorithm.tracks_ages:
            self.age_since(before)
        self._derive()
        return self.seen(moved)

    def age_since(self, before: Tensor) -> None:
        """Carries the ages of active entries over from the masks before, bits like `mask_bits`."""
        entries = math.prod(self.planned.slice_shape)
        carry = Carrier(before, self.mask_bits, entries, self.ages.shape[1])
        self.ages.copy_(aged(self.ages, carry))

    def seen(self, moved: int | Tensor) -> Change:
        """What is kept track of, as it is after so many entries moved."""
        algorithm = self.planned.algorithm
        return Change(moved, len(self.mask_bits) * self.planned.active_per_slice,
                      common(self.first_bits, self.mask_bits) if algorithm.tracks else 0,
                      self.ages.sum() if algorithm.tracks_ages else 0)

    @property
    def basis(self) -> Hashable:
        """What decides which kernels a pass launches for the weight, and on which memory; None: not
        as in the next pass."""
        if self.collector is not None:
            return None
        held = self.held_bits._version if self.planned.algorithm.holds else 0
        tables = (getattr(self, TABLE + name) for name in self._table_names)
        return held, *(t.data_ptr() for t in (self.mask_bits, self.index, *tables))

    @property
    def kept(self) -> Tensor | None:
        """(slices, k) bool, the active entries that are not held; None: no entry is."""
        if not self.planned.algorithm.holds:
            return None
        if self._holds[0] != self.held_bits._version:  # a device is asked once
            self._holds = self.held_bits._version, bool(self.held_bits.any())
        # unpacked where it is needed: a byte an entry would be more than the bits save
        return ~unpack(self.held_bits, self.values_shape[1]) if self._holds[1] else None

    def hold(self, kept: Tensor) -> None:
        """Holds all entries but these, (slices, k) bool; that they are zero is the caller's."""
        self.held_bits.copy_(pack(~kept))
        self._holds = self.held_bits._version, True  # without asking the device

    def finish(self, gradient: Tensor, values: Tensor) -> Tensor:
        """A gradient of the values, or the buffer that it was added to, with zeros for entries that
        are held; in place."""
        kept = self.kept
        return gradient if kept is None else gradient.mul_(kept)

    def collect(self, compute: Callable[[], Tensor]) -> None:
        """Takes a micro-batch's gradient of the dense weight, (out, in), if it is wanted."""
        if self.collector is not None:
            self.collector.take(compute)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactWeight:
        """Moves to another device, whose kernels want the mask in their own form."""
        before = self.mask_bits.device
        super()._apply(fn, recurse)
        if self.mask_bits.device != before and before.type != "meta":
            self.index_mask()
        return self

    def _check_masks(self) -> None:
        """Holds the packed bits to the plan."""
        k = self.planned.active_per_slice
        masks = np.unpackbits(self.mask_bits.cpu().numpy(), axis=1,
                              count=math.prod(self.planned.slice_shape))
        counts = masks.sum(axis=1, dtype=np.int64).tolist()
        if any(count != k for count in counts):
            raise ValueError(f"the slices of {self.planned.name} have {counts} active entries in "
                             f"their masks instead of {k} each; use another checkpoint")
        if fault := self.planned.fault(masks):
            raise ValueError(f"the masks of {self.planned.name} are not {fault}; use another "
                             "checkpoint")

    @property
    def mask(self) -> Mask:
        """Mask as the kernels take it."""
        tables = self._tables and replace(
            self._tables, **{name: getattr(self, TABLE + name) for name in self._table_names})
        return Mask(self.mask_bits, self.index, self.shape, self.planned.slice_shape,
                    self.planned.axis, self.planned.active_per_slice, tables)

    def forward(self, values: Tensor) -> Tensor:
        self.choose(values)
        return values if self.pass_through else _Expand.apply(values, self)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.compress(weight, self.mask)

    def expand(self, values: Tensor, mask: Mask) -> Tensor:
        """Dense weight (out, in) of the values."""
        return dispatch.expand(values, mask)

    def compress(self, dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
        """Entries of a dense weight or gradient (out, in) that are values, added to `out` if there
        is one."""
        return dispatch.compress(dense, mask, out)


def _return_gradient(values: Tensor, compute: Compute) -> Tensor:
    return compute(None)


def _local_shape(weight: SparseWeight, world: int) -> tuple[int, int]:
    out, inputs = weight.shape
    return (out // world, inputs) if weight.axis == 0 else (out, inputs // world)


def make_compact(module: nn.Module, compact: CompactWeight, **replaced: Any) -> None:
    """Makes `module.weight` compact: from here on the module's parameter is the vector of active
    values.

    Args:
        replaced: attributes that the module has until `densify`, methods for example.
    """
    dense = module.weight
    # what frameworks read off parameters: tensor_model_parallel, partition_dim, ...
    marks = dict(vars(dense))
    assert tuple(dense.shape) == compact.shape, (
        compact.planned.name, tuple(dense.shape), compact.shape)
    parametrize.register_parametrization(module, "weight", compact, unsafe=True)
    for key, value in marks.items():
        setattr(module.parametrizations.weight.original, key, value)
    for key, value in replaced.items():
        setattr(module, key, value)
    compact.replaced = list(replaced)


def compact_of(module: nn.Module) -> CompactWeight | None:
    """The module's compact weight, None for a dense module."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.parametrizations.weight[0]
    return first if isinstance(first, CompactWeight) else None


def sparse_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose weight is compact."""
    return (m for m in model.modules() if compact_of(m) is not None)


@dataclass
class Collector:
    """The gradient of a dense weight in a step, signed.

    Attributes:
        gradient: (out, in): fp32, to which every micro-batch adds; or of the last micro-batch
            alone, as backward made it.
        to_come: micro-batches up to the one that is kept; 0 where they are added up.
    """

    gradient: Tensor | None = None
    to_come: int = 0

    def take(self, compute: Callable[[], Tensor]) -> None:
        if self.to_come == 0:
            self.gradient += compute()
            return
        self.to_come -= 1
        if self.to_come == 0:
            self.gradient = compute().detach()


def collect_dense_gradients(models: Iterable[nn.Module], last_of: int) -> None:
    """Has the backward passes of a step collect the gradients of the dense weights of these models.

    Args:
        last_of: micro-batches of the step, of which the last alone counts; 0: all are added up.
    """
    for module in (m for model in models for m in sparse_modules(model)):
        compact = compact_of(module)
        compact.collector = Collector(to_come=last_of) if last_of else Collector(
            torch.zeros(compact.shape, device=compact.mask_bits.device))


def drop_dense_gradients(models: Iterable[nn.Module]) -> None:
    """Undoes `collect_dense_gradients`."""
    for module in (m for model in models for m in sparse_modules(model)):
        compact_of(module).collector = None


def densify(model: nn.Module) -> nn.Module:
    """Turns every compact weight into an ordinary parameter; revived entries start at zero, outputs
    are unchanged. The parameters are new ones, for a new optimizer.

    Returns:
        The model.

    Raises:
        ValueError: a weight is sharded by `fully_shard`.
    """
    for module in list(sparse_modules(model)):
        values, replaced = module.parametrizations.weight.original, compact_of(module).replaced
        if hasattr(values, "device_mesh"):
            raise ValueError(f"densify: {compact_of(module).planned.name} is sharded over ranks; "
                             "load the full state (get_model_state_dict) into a sparse module that "
                             "is not, and densify that")
        marks, trains = dict(vars(values)), values.requires_grad
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        # PyTorch gives the values the weight's shape, which a graph that knows them has not.
        module.weight = nn.Parameter(module.weight.detach(), trains)
        for name in replaced:
            delattr(module, name)
        for key, value in marks.items():
            setattr(module.weight, key, value)
    return model


@contextmanager
def expanded(model: nn.Module, at_once: bool = True) -> Iterator[None]:
    """Expands every compact weight once and keeps the copies until the context ends, but for layers
    that multiply with the values.

    Args:
        at_once: on entry and not on first use. With full recomputation the first use is inside a
            no_grad forward, and a copy cached there would silently cut the weight from its
            gradient. Where weights are not used inside such a forward, expanding on first use lets
            parameter gathers overlap with the layers before.
    """
    with parametrize.cached():
        if at_once:
            for module in sparse_modules(model):
                if compact_of(module).product is None:
                    _ = module.weight
        yield
