"""Wanda and SparseGPT in NumPy and float64, written from their papers, without the package's."""

from __future__ import annotations

import numpy as np

from megatron_spdf.sparsity.plan import SparseWeight


def dampened(inputs: np.ndarray) -> np.ndarray:
    """H of inputs (tokens, in), with 1% of the mean of its diagonal added to it."""
    hessian = 2.0 * inputs.T @ inputs / len(inputs)
    return hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))


def brain_surgery(w: SparseWeight, weight: np.ndarray, hessian: np.ndarray, block: int = 128,
                  given: np.ndarray | None = None,
                  matrices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgery with the columns on the left done (Hassibi et al. 1993, equation 5), an
    inverse for every column. Values and mask of the weight (out, in).

    Args:
        block: columns whose masks are chosen together, within a slice.
        given: mask; None: chosen at the beginning of each block of each slice.
        matrices: (out,) number of the matrix that each row is of; None: all of one.
    """
    values, mask = weight.astype(np.float64), np.ones(w.shape, bool) if given is None else given
    rows, width = w.slice_shape
    matrices = np.zeros(len(weight), int) if matrices is None else matrices
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(w.shape[1])]
    for column, inverse in enumerate(inverses):
        inside = column % width
        if given is None and inside % block == 0:
            end = min(inside + block, width)
            active = w.active_per_slice * end // width - w.active_per_slice * inside // width
            columns = range(column, column + end - inside)
            for top in range(0, w.shape[0], rows):
                cost = np.stack([values[top : top + rows, c] ** 2 / inverses[c][0, 0]
                                 for c in columns], 1)
                left, taken = 0, matrices[top : top + rows]
                for number in sorted(set(taken)):
                    own = np.flatnonzero(taken == number)
                    share = active * (left + len(own)) // rows - active * left // rows
                    kept = np.zeros(cost[own].size, bool)
                    kept[np.argsort(-cost[own], axis=None)[:share]] = True
                    mask[np.ix_(top + own, columns)] = kept.reshape(cost[own].shape)
                    left += len(own)
        for row in np.flatnonzero(~mask[:, column]):
            values[row, column:] -= values[row, column] / inverse[0, 0] * inverse[:, 0]
    return values, mask


def wanda(w: SparseWeight, weight: np.ndarray,
          inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest |w| x norm of the input of each row of each slice die, equally many; values and
    mask of the weight (out, in)."""
    scores, mask = np.abs(weight) * np.sqrt((inputs**2).mean(0)), np.ones(w.shape, bool)
    width = w.slice_shape[1]
    dying = width - w.active_per_slice * w.slices // w.shape[0] // (w.shape[1] // width)
    for first in range(0, w.shape[1], width):
        part = slice(first, first + width)
        order = np.argsort(scores[:, part], axis=1)[:, :dying]
        np.put_along_axis(mask[:, part], order, False, axis=1)
    return weight * mask, mask
