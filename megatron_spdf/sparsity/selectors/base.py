"""A selector: which entries of a trained weight stay, and with which values.

A file of this room holds one selector and registers it. So does a file of somebody else's, see
`registry.py`. `tools/convert_checkpoint.py --select NAME` takes it.

It sees a whole weight at a time, and what it has kept of the weight's inputs if it asks for them.
Each slice keeps as many entries as the plan says, so that the run goes on at every layout.

Letters: n entries of a slice, C slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.architecture.base import Model
from megatron_spdf.registry import Registry
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.settings import Sparsity
from megatron_spdf.sparsity.slices import slice_of


class Inputs(Protocol):
    """What a selector keeps of a weight's inputs on the calibration text."""

    def add(self, inputs: Tensor) -> None:
        """Counts further inputs in.

        Args:
            inputs: (tokens, in) float32.
        """


@dataclass(frozen=True)
class TrainedWeight:
    """A weight whose entries are to be selected.

    Attributes:
        values: (out, in) float32, which stay as they are.
        planned: its sparsity.
        seed: of the plan's masks.
        matrices: (out,) number of the matrix that each row is of, where several are one weight:
            queries, keys and values; gates and ups.
        inputs: what `Selector.inputs` began, full; None where the selector is not `calibrated`.
    """

    values: Tensor
    planned: SparseWeight
    seed: int
    matrices: np.ndarray
    inputs: Inputs | None = None


class Selector:
    """Chooses the entries of a weight that stay.

    Attributes:
        name: of `--select`.
        calibrated: looks at the weight's inputs.
        seeded: takes the masks that the plan draws, which exist without a checkpoint.
        reads_levels: takes from weights how sparse they are, where a recipe does not say it.
        how: what stays, for the log and for `run.json`: "the largest magnitudes in each slice".
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    reads_levels: ClassVar[bool] = False
    how: ClassVar[str]

    def inputs(self, columns: int, device: torch.device) -> Inputs:
        """Begins to count the inputs of a weight with so many columns; asked for where the selector
        is `calibrated`."""
        raise NotImplementedError

    def levels(self, sparsity: Sparsity, model: Model, read: Callable[[str], Tensor]) -> Sparsity:
        """Reads how sparse the weights of a model are; asked for where the selector
        `reads_levels`.

        Args:
            sparsity: of the recipe, which may say it.
            read: canonical name -> dense weight.

        Raises:
            ValueError: they have no masks, or none that the recipe's algorithm can keep.
        """
        raise NotImplementedError

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        """Chooses the entries of a weight, and their values. Ties go by position.

        Returns:
            (out, in) float32, whose entries outside of the masks nobody reads; and the masks of the
            slices, (C, n) bool.

        Raises:
            ValueError: the inputs do not allow a choice, with the remedy.
        """
        raise NotImplementedError

    def check(self, planned: SparseWeight) -> None:
        """Requires that the selector can choose masks of the weight's pattern.

        Raises:
            ValueError: it ranks entries, and the pattern has no mask of the highest ranks.
        """
        if not self.seeded and not planned.pattern.selects:
            raise ValueError(f"select={self.name}: sparsity.pattern={planned.pattern.name} has no "
                             "mask of the largest magnitudes; use select=random or "
                             "sparsity.pattern=unstructured")


def largest_masks(scores: Tensor, planned: SparseWeight) -> np.ndarray:
    """The masks of a weight's slices that keep the highest scores as the pattern allows, (C, n)
    bool.

    Args:
        scores: (out, in), of which magnitudes count.
    """
    return np.stack([planned.largest(slice_of(scores, planned, number).cpu().numpy())
                     for number in range(planned.slices)])


SELECTORS: Registry[type[Selector]] = Registry("selector", "megatron_spdf.sparsity.selectors")
