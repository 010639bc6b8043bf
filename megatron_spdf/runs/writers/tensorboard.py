"""TensorBoard's event files, in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from megatron_spdf.recipe.recipe import LOG_WRITERS
from megatron_spdf.runs.writers.base import Writer

if TYPE_CHECKING:
    from megatron_spdf.runs.run_dir import RunDir


class TensorBoard(Writer):
    """Event files of which TensorBoard shows no step after `step` from those before."""

    name: ClassVar = "tensorboard"
    type: ClassVar = bool
    field: ClassVar = Field(True, description="write TensorBoard events beside log.jsonl")
    title: ClassVar = "TensorBoard"

    def __init__(self, value: bool, run: RunDir, step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self._writer = SummaryWriter(run.tensorboard, purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See the base."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See the base."""
        self._writer.close()


LOG_WRITERS.register(TensorBoard.name, TensorBoard)
