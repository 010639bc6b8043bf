"""SparseGPT: entries die by the error that their death leaves in a layer's outputs once the others
have made up for it as well as they can, and the others do (Frantar and Alistarh 2023, arXiv
2301.00774, algorithm 1).

With H = 2 X^T X of the inputs X, dampened, and U the upper Cholesky factor of its inverse, columns
go from left to right: entry (r, c) costs w^2 / U_cc^2, and the death of one adds
-w / U_cc U_c,j to the entries j > c of its row. The masks of a block of columns are chosen at its
beginning, when all columns before it are done.

Each slice keeps as many entries as the plan says. A block lies within a slice, and has its share of
the slice's active entries: k end // columns - k start // columns. So a slice of a row-parallel
weight that is narrower than a block makes a block of its own. Where several matrices are one
weight, rows of a slice are compared within their matrix, which has its share of the block's entries
in the same way: else values, whose weights are small beside those of queries and keys, would lose
nearly all. Patterns whose columns go together in groups are chosen group by group, and tiles all at
the beginning.

Letters: I columns of a weight, C slices, n entries of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.sparsity.patterns.unstructured import largest_mask
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.selectors.base import (
    SELECTORS,
    Selector,
    TrainedWeight,
    largest_masks,
)
from megatron_spdf.sparsity.slices import join_slices, slice_of

BLOCK = 128  # columns, as in the paper
DAMPENING = 0.01  # of the mean of H's diagonal, added to it


class Hessian:
    """H of a weight's inputs, 4 bytes x I^2."""

    def __init__(self, columns: int, device: torch.device):
        self._sum, self._tokens = torch.zeros(columns, columns, device=device), 0

    def add(self, inputs: Tensor) -> None:
        self._sum.addmm_(inputs.t(), inputs)
        self._tokens += len(inputs)

    def dead(self) -> Tensor:
        """(I,) bool, the inputs that were always zero."""
        return self._sum.diagonal() == 0

    def inverse_factor(self) -> Tensor:
        """U, (I, I) float32, of the inverse of H, dampened; factored in float64.

        Raises:
            ValueError: H has no inverse in these numbers.
        """
        hessian = self._sum.double() * (2.0 / self._tokens)
        diagonal = hessian.diagonal()  # a view
        diagonal[self.dead()] = 1.0
        diagonal += DAMPENING * diagonal.mean()
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            return torch.linalg.cholesky(inverse, upper=True).float()
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"select=sparsegpt: the Hessian of {len(diagonal)} inputs over {self._tokens:,} "
                f"tokens has no inverse ({error}); give more --calibration-samples, or use "
                "--select wanda") from None


class SparseGpt(Selector):
    """Entries whose death would cost most in the layer's outputs. They make up for the dead."""

    name = "sparsegpt"
    calibrated = True
    how = "what costs the layers' outputs least, the rest made up for it (SparseGPT), in each slice"

    def inputs(self, columns: int, device: torch.device) -> Hessian:
        return Hessian(columns, device)

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        assert isinstance(trained.inputs, Hessian)
        factor, values = trained.inputs.inverse_factor(), trained.values.clone()
        values[:, trained.inputs.dead()] = 0.0
        mask = _Choice(trained.planned, trained.matrices, factor.diagonal())
        mask.begin(values)
        for start, end in blocks(trained.planned):
            errors = _prune_block(values, factor, mask, start, end)
            values[:, end:] -= errors @ factor[start:end, end:]
        return values, mask.of_slices()


def blocks(planned: SparseWeight) -> Iterator[tuple[int, int]]:
    """First and last + 1 column of each block, at most `BLOCK` of one slice, in whole groups."""
    columns, width = planned.shape[1], planned.slice_shape[1]
    size = BLOCK - BLOCK % (planned.pattern.columns_together or 1)
    for first in range(0, columns, width):
        for start in range(first, first + width, size):
            yield start, min(start + size, first + width)


def _prune_block(values: Tensor, factor: Tensor, mask: _Choice, start: int, end: int) -> Tensor:
    """Prunes the columns of a block of a weight, one after the other.

    Returns:
        (out, end - start), what the entries of the block lost over the diagonal of the factor.
    """
    errors = torch.zeros_like(values[:, start:end])
    for column in range(start, end):
        mask.arrive(values, column, start, end)
        kept, now = mask.whole[:, column], values[:, column].clone()
        values[:, column] = torch.where(kept, now, 0.0)
        lost = torch.where(kept, 0.0, now) / factor[column, column]
        values[:, column + 1 : end] -= lost.outer(factor[column, column + 1 : end])
        errors[:, column - start] = lost
    return errors


class _Choice:
    """The mask of a weight while it is chosen from left to right.

    Attributes:
        whole: (out, in) bool.
    """

    def __init__(self, planned: SparseWeight, matrices: np.ndarray, diagonal: Tensor):
        self.planned, self._matrices, self._diagonal = planned, matrices, diagonal
        self._together = planned.pattern.columns_together
        self.whole = torch.zeros(planned.shape, dtype=torch.bool, device=diagonal.device)

    def begin(self, values: Tensor) -> None:
        """Chooses all masks where the pattern's columns all go together."""
        if self._together is None:
            masks = largest_masks((values / self._diagonal).square(), self.planned)
            self.whole.copy_(join_slices(torch.from_numpy(masks), self.planned))

    def arrive(self, values: Tensor, column: int, start: int, end: int) -> None:
        """Chooses the masks that are due at a column of a block."""
        if self._together == 1 and column == start:
            self._choose(values, start, end)
        elif self._together not in (None, 1) and column % self._together == 0:
            self._choose(values, column, column + self._together)

    def of_slices(self) -> np.ndarray:
        """(C, n) bool."""
        return np.stack([slice_of(self.whole, self.planned, number).cpu().numpy()
                         for number in range(self.planned.slices)])

    def _choose(self, values: Tensor, start: int, end: int) -> None:
        """Chooses the masks of some columns, in each slice that has them."""
        scores = (values[:, start:end] / self._diagonal[start:end]).square().cpu().numpy()
        rows = self.planned.slice_shape[0]
        for top in range(0, len(scores), rows):
            part = slice(top, top + rows)
            mask = (self._largest(scores[part], self._matrices[part], start, end)
                    if self._together == 1
                    else self.planned.pattern.largest(scores[part], self.planned.stored))
            self.whole[part, start:end] = torch.from_numpy(mask)

    def _largest(self, scores: np.ndarray, matrices: np.ndarray, start: int,
                 end: int) -> np.ndarray:
        """The mask of the highest scores of some columns of a slice, in each matrix that its rows
        are of."""
        width, active = self.planned.slice_shape[1], self.planned.active_per_slice
        first = start // width * width
        count = active * (end - first) // width - active * (start - first) // width
        mask, above = np.zeros(scores.shape, bool), 0
        for number in np.unique(matrices):
            rows = np.flatnonzero(matrices == number)
            share = (count * (above + len(rows)) // len(scores) - count * above // len(scores))
            above += len(rows)
            if share:
                part = scores[rows]
                mask[rows] = largest_mask(part.reshape(-1), share).reshape(part.shape)
        return mask


SELECTORS.register(SparseGpt.name, SparseGpt)
