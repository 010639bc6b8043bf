"""A pattern: which masks the slices of a weight may have.

A file of this room holds one pattern and registers it. So does a file of somebody else's, see
`registry.py`. A pattern is also a section of the recipe: its fields are keys of `sparsity`, beside
those that every pattern has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_spdf.registry import Registry
from megatron_spdf.section import Section

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

Shape = tuple[int, int]  # (rows, columns): of a slice, or (out, in) of a weight


class Pattern(Section):
    """Which masks the slices of a weight may have.

    Every slice of a weight has the same shape and the same number of active entries. Its mask
    depends on nothing but (seed, name of the weight, slice).

    Attributes:
        name: in a recipe's `sparsity.pattern`.
        moving_unit: (rows, columns) of what can die or be born as a whole while the others of its
            slice stay; None: the entries are tied to each other, and masks do not move.
        columns_together: columns whose masks are chosen together, whatever those of the others are;
            1: any entries may be active; None: all columns of a slice.
        remedy: for a weight that is cut into too few slices.
    """

    name: ClassVar[str]
    moving_unit: ClassVar[Shape | None] = None
    columns_together: ClassVar[int | None] = None
    remedy: ClassVar[str] = "another level or pattern"

    def cut(self, name: str, shape: Shape, axis: int, most: int, level: float) -> int:
        """Returns the number of slices that a weight is cut into, a divisor of `most`.

        Args:
            name, shape, axis: of the weight (out, in), and the axis that is cut.
            most: slices, the number of query groups.
            level: the sparsity asked for.

        Raises:
            ValueError: the weight cannot have this pattern, with the rule and a remedy.
        """
        return most

    def active(self, shape: Shape, level: float) -> int:
        """Returns the exact number of active entries of a slice."""
        return max(1, round((1.0 - level) * shape[0] * shape[1]))

    def rounded(self, shape: Shape, level: float) -> float:
        """Returns the level that initial values and learning rates go by.

        That is the one asked for, unless the pattern may be far from it.
        """
        return level

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        """Draws the mask of one slice from the stream keyed by (seed, name, slice).

        Returns:
            (rows, columns) bool.
        """
        raise NotImplementedError

    def fault(self, masks: np.ndarray, shape: Shape, level: float) -> str | None:
        """Returns what masks of slices, (slices, rows, columns) bool, are not; None: they are fine.

        They have the right number of active entries each.
        """
        return None

    def largest(self, values: np.ndarray, level: float) -> np.ndarray:
        """Returns the mask that keeps the largest magnitudes of a slice.

        Args:
            values: (rows, columns), floating point.

        Returns:
            (rows, columns) bool.
        """
        from torch import from_numpy

        return self.chosen(from_numpy(np.abs(values))[None], level)[0].numpy()

    def chosen(self, magnitudes: Tensor, level: float) -> Tensor:
        """Returns the masks that weights choose for themselves at every step, by their magnitudes,
        ties by position.

        Args:
            magnitudes: (slices, rows, columns) fp32, on any device.

        Returns:
            (slices, rows, columns) bool, with as many active entries in each slice as `active`
            says.
        """
        raise NotImplementedError

    def fill_chosen(self, values: Tensor, level: float, bits: Tensor,
                    *more: tuple[int, Tensor]) -> Tensor:
        """Fills packed bits with the masks that weights choose, in place.

        Args:
            values: (slices, rows, columns), as they run.
            bits: (slices, ceil(rows columns / 8)) uint8.
            more: a number of entries of each slice and bits like those, which are filled with so
                many of the largest magnitudes; once at most.

        Returns:
            The number of entries that became active, ().
        """
        from megatron_spdf.kernels.mask import ones, pack
        from megatron_spdf.sparsity.largest import fill_largest

        found = pack(self.chosen(values.float().abs(), level).flatten(1))
        born = ones(found & ~bits).sum()
        bits.copy_(found)
        if more:
            fill_largest(values.flatten(1), more)
        return born

    def exchange(self, active: np.ndarray, to_die: np.ndarray, to_be_born: np.ndarray,
                 count: int) -> tuple[np.ndarray, np.ndarray]:
        """Chooses the units of a slice that die and those that are born, where not any may be.

        Args:
            active: (rows, columns) bool, the mask of the slice in units.
            to_die: (active units,) scores, float64; the lowest die first.
            to_be_born: (inactive units,) scores, float64; the lowest are born first.
            count: units that die at most.

        Returns:
            Row-major positions of those that die, and as many of those that are born.
        """
        raise NotImplementedError

    @property
    def chooses(self) -> bool:
        """True if weights can choose masks of the pattern."""
        return type(self).chosen is not Pattern.chosen

    @property
    def exchanges(self) -> bool:
        """True if units die and are born as the pattern's `exchange` allows, and not any."""
        return type(self).exchange is not Pattern.exchange

    @property
    def selects(self) -> bool:
        """True if the pattern has a mask of the largest magnitudes."""
        return self.chooses or type(self).largest is not Pattern.largest

    @property
    def skips_zeros(self) -> bool:
        """True if a GPU multiplies with the active entries alone, forward and backward."""
        return False

    @property
    def product_rate(self) -> str:
        """Name of the rate of its products among those that the planner knows
        (`planning/rates.py`)."""
        return "dense"

    def table_bytes(self, active: int) -> int:
        """Returns the bytes on a GPU of what its product derives from masks of `active` entries."""
        return 0

    def describe(self, levels: list[float], degrees: int) -> str:
        """Says what the pattern makes of the levels asked for, for the plan's table.

        Args:
            degrees: the tensor-parallel degrees that are left are its divisors.
        """
        return ""


PATTERNS: Registry[type[Pattern]] = Registry("pattern", "megatron_spdf.sparsity.patterns")
