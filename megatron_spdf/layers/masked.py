"""The masked weight: its parameter has all entries of the weight, (slices of this rank, entries of
a slice), and the layer computes with those that its mask keeps.

It is a compact weight whose values are all entries, so that engines, checkpoints and planner treat
it as one. The values choose their mask, see `sparsity/algorithms/keeping.py`.

Letters: S slices of this rank, E entries of a slice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_spdf.kernels.mask import Mask, unpack
from megatron_spdf.layers.compact import CompactWeight, compact_of, sparse_modules
from megatron_spdf.layers.products.base import Product
from megatron_spdf.sparsity.plan import SparseWeight


class MaskedWeight(CompactWeight):
    """Maps all entries of this rank's slices to its shard of the masked weight, and the gradient of
    that to all entries that are trained.

    Args:
        micro_batches: backward passes of a step, over which the decay of a step is spread.
        others: as of `CompactWeight`.

    Attributes:
        due: whether the values choose their mask at the next use.
        born: (), the number of entries that the last choice made active; None: it was the first.
        trained_bits: as `mask_bits`, the entries that get a gradient; only where not all do.
    """

    trained_bits: Tensor

    def __init__(self, weight: SparseWeight, seed: int, rank: int, world: int,
                 device: torch.device | str, product: Product | None, micro_batches: int):
        super().__init__(weight, seed, rank, world, device, product)
        self.micro_batches, self.due, self.born = micro_batches, True, None
        self._drawn = True  # the mask is the plan's, which nobody has chosen
        if weight.trains_some:
            self.register_buffer("trained_bits", torch.full_like(self.mask_bits, 255))

    @torch.no_grad()
    def choose(self, values: Tensor) -> None:
        if not self.due or values.is_meta:
            return
        self.due, planned = False, self.planned
        before = self.mask_bits.clone() if planned.algorithm.tracks_ages else None
        more = ([(planned.trained_per_slice, self.trained_bits)] if planned.trains_some else [])
        born = planned.pattern.fill_chosen(values.detach().reshape(-1, *planned.slice_shape),
                                           planned.level, self.mask_bits, *more)
        if self._drawn:
            self.begin_with(self.mask_bits)
        else:
            self.born = born
            if before is not None:
                self.age_since(before)
        self._drawn = False

    @property
    def basis(self) -> Hashable:
        return None if self.due else super().basis

    def take_loaded(self) -> None:
        self.due = self._drawn = False  # the masks that a checkpoint has hold until the next choice
        super().take_loaded()

    def expand(self, values: Tensor, mask: Mask) -> Tensor:
        return _masked(values, mask)

    def compress(self, dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
        return _entries(dense, mask, out)

    def finish(self, gradient: Tensor, values: Tensor) -> Tensor:
        """A gradient of all entries, or the buffer that it was added to: zero where none is
        trained, and with this backward pass's part of the decay; in place."""
        trained = None
        if self.planned.trains_some:
            trained = unpack(self.trained_bits, self.values_shape[1])
            gradient.mul_(trained)
        on_active, beside = self.planned.algorithm.decay(self.planned)
        if on_active or beside:
            # an fp32 buffer holds what bf16 would round away
            buffer = getattr(values, "main_grad", gradient)
            mask = unpack(self.mask_bits, self.values_shape[1])
            rates = torch.where(mask, on_active, beside)
            if trained is not None:
                rates *= trained
            buffer.addcmul_(rates.to(buffer.dtype), values.detach().to(buffer.dtype),
                            value=1.0 / self.micro_batches)
        return gradient

    def _derive(self) -> None:
        """Derives nothing: the bits will do."""
        self.register_buffer("index", self.mask_bits.new_empty(0), persistent=False)
        self._table_names, self._tables = [], None


class MaskedProduct(Product):
    """The product with the weight masked for the moment."""

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return x @ _masked(values, mask).T

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return gradient @ _masked(values, mask)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        return _entries(gradient.T @ x, mask, out)

    def tables(self, bits: Tensor, weight: SparseWeight) -> Any:
        return None


def choose_masks(models: Iterable[nn.Module], due: bool = True) -> None:
    """Has the masked weights of these models choose their masks when they are used next, or keep
    them."""
    for module in (m for model in models for m in sparse_modules(model)):
        compact_of(module).due = due


def _masked(values: Tensor, mask: Mask) -> Tensor:
    """Dense weight (out, in) of all entries (S, E), with zeros where it is masked."""
    if values.is_meta:
        return values.new_empty(mask.shape)
    slices = values * unpack(mask.bits, mask.entries)
    if mask.axis == 0:  # slices are one after another in memory
        return slices.view(mask.shape)
    return slices.view(-1, *mask.slice_shape).transpose(0, 1).reshape(mask.shape)


def _entries(dense: Tensor, mask: Mask, out: Tensor | None) -> Tensor:
    """All entries (S, E) of a dense weight or gradient (out, in), added to `out` if there is
    one."""
    rows, columns = mask.slice_shape
    if mask.axis == 0:
        entries = dense.reshape(mask.slices, mask.entries)
    else:
        entries = dense.view(rows, mask.slices, columns).transpose(0, 1).reshape(mask.slices, -1)
    return entries if out is None else out.add_(entries)
