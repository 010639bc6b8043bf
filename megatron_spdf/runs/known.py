"""Ends of runs that are known from tables of losses, so that they need not be made again: those
that another machine has run, or that are published.

    python tools/experiment.py configs/experiments/fair_comparison.yaml --report \\
        --known docs/results/moving_masks_tried.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.budget import active_weights, linear_weights
from megatron_spdf.runs.experiment import Cell, Ended
from megatron_spdf.runs.loss_table import LossRow, read_table
from megatron_spdf.schedule.stages import stages_of


class Known:
    """Rows of tables of losses, by the labels of their cells and by their seeds.

    Args:
        paths: tables that `tools/experiment.py` wrote, of this grid.

    Raises:
        ValueError: see `read_table`; or they have a run twice.
    """

    def __init__(self, paths: Sequence[Path]):
        self._rows: dict[tuple, tuple[Path, LossRow]] = {}
        for path in paths:
            for row in read_table(path):
                key = _key(row.labels, row.seed)
                if key in self._rows:
                    raise ValueError(f"{path} has {_named(row)}, which is in {self._rows[key][0]} "
                                     "already; leave one of the rows out")
                self._rows[key] = path, row

    def __call__(self, cell: Cell) -> Ended:
        """Seed -> end of the run, for the runs of a cell that the tables have.

        Raises:
            ValueError: a row is of a run of another size or length.
        """
        found: Ended = {}
        for seed, recipe in cell.recipes.items():
            path, row = self._rows.get(_key(cell.labels, seed), (None, None))
            if row:
                _require_same(path, row, recipe)
                found[seed] = {"kind": "valid", "step": recipe.steps, "loss": row.loss}
                if row.standard_error is not None:
                    found[seed]["standard_error"] = row.standard_error
        return found


def _require_same(path: Path, row: LossRow, recipe: Recipe) -> None:
    """Raises a ValueError where a row is of a run of another size or length than the recipe's."""
    own = {"tokens": sum(stage.tokens for stage in stages_of(recipe)),
           "weights": linear_weights(recipe), "active_weights": active_weights(recipe)}
    for name, value in own.items():
        if (there := getattr(row, name)) != value:
            raise ValueError(f"{path}: {_named(row)} has {name} {there:,.0f}, and that run of the "
                             f"grid has {value:,.0f}; the table is of another grid, or of an older "
                             "version of it: leave that row out")


def _key(labels: dict[str, str], seed: int) -> tuple:
    return (*sorted(labels.items()), seed)


def _named(row: LossRow) -> str:
    return ", ".join([*map("=".join, row.labels.items()), f"seed={row.seed}"])
