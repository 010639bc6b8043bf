"""Ends of runs that are known from a table of losses, so that they need not be made again: those
that another machine has run, or that are published.

    python tools/experiment.py configs/experiments/fair_comparison.yaml --report \\
        --known docs/results/moving_masks_tried.csv
"""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.budget import active_weights, linear_weights
from megatron_spdf.runs.experiment import Cell, Ended
from megatron_spdf.runs.loss_table import LossRow, read_table
from megatron_spdf.schedule.stages import stages_of


class Known:
    """Rows of a table of losses, by the labels of their cells and by their seeds.

    Args:
        path: table that `tools/experiment.py` wrote, of this grid.

    Raises:
        ValueError: see `read_table`; or it has a run twice.
    """

    def __init__(self, path: Path):
        self._path, self._rows = path, {}
        for row in read_table(path):
            key = _key(row.labels, row.seed)
            if key in self._rows:
                raise ValueError(f"{path} has {_named(row)} twice; leave one of the rows out")
            self._rows[key] = row

    def __call__(self, cell: Cell) -> Ended:
        """Seed -> end of the run, for the runs of a cell that the table has.

        Raises:
            ValueError: a row is of a run of another size or length.
        """
        found: Ended = {}
        for seed, recipe in cell.recipes.items():
            if row := self._rows.get(_key(cell.labels, seed)):
                self._require_same(row, recipe)
                found[seed] = {"kind": "valid", "step": recipe.steps, "loss": row.loss}
                if row.standard_error is not None:
                    found[seed]["standard_error"] = row.standard_error
        return found

    def _require_same(self, row: LossRow, recipe: Recipe) -> None:
        own = {"tokens": sum(stage.tokens for stage in stages_of(recipe)),
               "weights": linear_weights(recipe), "active_weights": active_weights(recipe)}
        for name, value in own.items():
            if (there := getattr(row, name)) != value:
                raise ValueError(f"{self._path}: {_named(row)} has {name} {there:,.0f}, and that "
                                 f"run of the grid has {value:,.0f}; the table is of another grid, "
                                 "or of an older version of it: leave that row out")


def _key(labels: dict[str, str], seed: int) -> tuple:
    return (*sorted(labels.items()), seed)


def _named(row: LossRow) -> str:
    return ", ".join([*map("=".join, row.labels.items()), f"seed={row.seed}"])
