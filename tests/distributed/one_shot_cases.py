"""What runs on the rank of test_one_shot.py: runs that begin from selected weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from megatron_spdf.convert.calibration import Calibration, check_text
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.data.pretraining.corpus import data_tokenizer
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe


class Given:
    """Random weights of a recipe's model, as a source of a run: of a size at which every part of
    the model matters."""

    path, origin = Path("given"), "given weights"

    def __init__(self, recipe: dict):
        self._recipe = Recipe.model_validate(recipe | {"output": "none"})
        self.model, draw = self._recipe.model, torch.Generator().manual_seed(3)
        self.weights = {weight.name: weight for weight in self.model.weights()}
        self.values = {}
        for name, weight in self.weights.items():
            values = torch.randn(weight.shape, generator=draw) / (
                weight.shape[1] ** 0.5 if weight.linear else 4.0)
            self.values[name] = values + ("layernorm.weight" in name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return data_tokenizer(self._recipe)

    def weight(self, name: str) -> torch.Tensor:
        return self.values[name]

    master = weight


def begun(recipe: dict, select: str, asked: dict | None) -> dict[str, float]:
    """Writes the run of a recipe with selected weights; losses before and after where text is asked
    for, by the fields of `Calibration`."""
    made, source = Recipe.model_validate(recipe), Given(recipe)
    text = check_text(Calibration(**asked), made, source.tokenizer) if asked else None
    written = write_initial_checkpoint(source, made, source.tokenizer, Path(made.output), select,
                                       text)
    losses = written.losses
    return {"dense": losses.dense, "pruned": losses.pruned} if losses else {}


def diverged(recipe: dict, asked: dict) -> str:
    """What is said of a model whose activations overflow."""
    made, source = Recipe.model_validate(recipe), Given(recipe)
    for linear in ("linear_fc1", "linear_fc2"):
        source.values[f"decoder.layers.1.mlp.{linear}.weight"] *= 1e30
    try:
        write_initial_checkpoint(source, made, source.tokenizer, Path(made.output), "wanda",
                                 check_text(Calibration(**asked), made, source.tokenizer))
    except ValueError as error:
        return str(error)
    return ""
