"""The teacher of a run: checked without a device, then put beside the engine's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_spdf.convert.source import fingerprint
from megatron_spdf.convert.teacher import open_teacher
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe

if TYPE_CHECKING:  # it imports megatron.core
    from megatron_spdf.engine.base import Engine


class Teacher:
    """The model that a recipe distills from, opened and checked; without one, nothing.

    Args:
        recipe: of the student's run.
        tokenizer: of its data.

    Attributes:
        source: the teacher's weights; None: the recipe distills from no model.

    Raises:
        ValueError: the teacher is damaged, or has another tokenizer than the data.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer):
        self.source = open_teacher(recipe, tokenizer)

    @property
    def contents(self) -> dict[str, str]:
        """Key of the recipe that names the teacher -> hash of what lies there."""
        return {"distill.teacher": fingerprint(self.source)} if self.source else {}

    @property
    def summary(self) -> str:
        """A line for the log, empty without a teacher."""
        if self.source is None:
            return ""
        parameters = sum(w.numel for w in self.source.weights.values())
        return (f"teacher: {self.source.origin}, {self.source.path}, "
                f"{parameters:,} parameters, frozen")

    def teach(self, engine: Engine) -> None:
        """Gives an engine's model the loss of the recipe, and the teacher beside it. All ranks
        call.

        Raises:
            ValueError: a weight of the teacher cannot be read, or is not finite.
        """
        if self.source is None:
            return
        from megatron_spdf.model.distillation import build_teacher, distill
        from megatron_spdf.model.init import LoadedWeights

        student = engine.models[-1]
        weights = LoadedWeights(self.source.weight)
        distill(student, build_teacher(engine.recipe, self.source.model, weights), engine.recipe)
